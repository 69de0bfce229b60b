"""Slugs and titles of tasks (tasks-api §2.2, §2.3)."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1024)
def prefix(project_name: str) -> str:
    """The letters in front of a task's number, from the project's name."""
    letters = "".join(char for char in project_name if char.isalnum())
    if not letters:
        return "TSK"
    capitals = [char for char in letters if char.isupper()]
    return "".join(capitals[:3]) if len(capitals) >= 3 else letters[:3].upper()


def slug(project_name: str, number: int | None) -> str:
    """`PRE-7`; empty without a number."""
    return "" if number is None else f"{prefix(project_name)}-{number}"


def title_from(description: str) -> str:
    """A title made of a description: its first line, at most 60 characters; "" of nothing."""
    if not description.strip():
        return ""
    line = description.strip().splitlines()[0].strip()
    return line if len(line) <= 60 else f"{line[:57]}..."
