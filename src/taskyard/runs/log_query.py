"""Query parameters of `R/session_logs/` (tasks-api §6.3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from taskyard.errors import InvalidInputError
from taskyard.events.entries import Filter, parse_time

DEFAULT_LIMIT = 1000
MAX_LIMIT = 5000
MAX_OFFSET = 2**63 - 1


@dataclass(frozen=True, slots=True)
class LogQuery:
    wanted: Filter
    limit: int
    offset: int


def parse(query: Mapping[str, str]) -> LogQuery:
    """Raises InvalidInputError naming the parameter that is wrong."""
    after = None
    if text := query.get("after", "").strip():
        # A plus sign that was not encoded arrives as a blank.
        after = parse_time(re.sub(r" (\d\d:?\d\d)$", r"+\1", text))
        if after is None:
            detail = "Datetime has wrong format. Use one of these formats instead: "
            detail += "YYYY-MM-DDThh:mm[:ss[.uuuuuu]][+HH:MM|-HH:MM|Z]."
            raise InvalidInputError(detail, attr="after")
    wanted = Filter(after, _names(query.get("event_types", "")), _names(query.get("exclude_types", "")))
    return LogQuery(
        wanted,
        _number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT),
        _number(query, "offset", 0, 0, MAX_OFFSET),
    )


def _names(text: str) -> list[str]:
    return [name for part in text.replace("\0", "").split(",") if (name := part.strip())]


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if re.fullmatch(r"\s*[+-]?\d{1,30}\s*", text, re.ASCII) is None:
        raise InvalidInputError("A valid integer is required.", attr=name)
    number = int(text)
    if number < least:
        detail = f"Ensure this value is greater than or equal to {least}."
        raise InvalidInputError(detail, code="min_value", attr=name)
    if number > most:
        raise InvalidInputError(
            f"Ensure this value is less than or equal to {most}.", code="max_value", attr=name
        )
    return number
