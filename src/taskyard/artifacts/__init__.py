"""Artifacts: files that people hand to a run, and files that a run leaves."""
