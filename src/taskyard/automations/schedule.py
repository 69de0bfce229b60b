"""When a cron expression fires (tasks-api §10)."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

from croniter import CroniterError, croniter


@cache
def _zones() -> frozenset[str]:
    # The two are files of some systems that mean another zone on each machine.
    return frozenset(available_timezones() - {"localtime", "posixrules"})


def is_timezone(name: str) -> bool:
    """Whether this is an IANA name; upper and lower case count."""
    return name in _zones()


def has_five_fields(expression: str) -> bool:
    return len(expression.split()) == 5


def is_valid(expression: str) -> bool:
    """Whether a five-field expression can be read and ever fires.

    croniter's random and hashed fields (`R`, `H`) are refused: they mean another time whenever they are asked.
    """
    if not croniter.is_valid(expression) or re.search(r"(?<![a-z])[rh](?![a-z])", expression, re.IGNORECASE):
        return False
    try:
        next_firing(expression, "UTC", datetime.now(UTC))
    except CroniterError:  # 30 February
        return False
    return True


def next_firing(expression: str, timezone: str, after: datetime) -> datetime:
    """The first firing after a moment, in UTC.

    When clocks go forward, a time that is skipped fires right after the gap. When they go back, an hour
    named in the expression fires the first time only, while `*` fires in both.
    """
    dates = croniter(expression, after.astimezone(ZoneInfo(timezone)))
    each_hour = expression.split()[1].startswith("*")
    while True:
        found: datetime = dates.get_next(datetime)
        second_time = found.utcoffset() != found.replace(fold=0).utcoffset()
        if each_hour or not second_time:
            return found.astimezone(UTC)
