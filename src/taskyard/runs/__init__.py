"""Runs: one execution of a task. `lifecycle` is the only place where a status changes."""
