"""Structured output of an agent: does it fit its task's JSON Schema? (tasks-api §5.5)"""

from __future__ import annotations

from taskyard.json_schema import value_problem_now as problem_of

__all__ = ["problem_of"]
