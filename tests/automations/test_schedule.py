"""When cron expressions fire, also when the clocks change."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from taskyard.automations.schedule import has_five_fields, is_timezone, is_valid, next_firing


def firings(expression: str, timezone: str, after: str, count: int = 3) -> list[str]:
    """The next firings as UTC times without seconds."""
    moment, found = datetime.fromisoformat(after), []
    for _ in range(count):
        moment = next_firing(expression, timezone, moment)
        assert moment.utcoffset() == timedelta(0)
        found.append(f"{moment:%m-%dT%H:%M}")
    return found


@pytest.mark.parametrize(
    ("expression", "timezone", "after", "expected"),
    [
        ("*/20 * * * *", "UTC", "2026-05-01T10:20Z", ["05-01T10:40", "05-01T11:00", "05-01T11:20"]),
        ("0 9 * * 1-5", "UTC", "2026-05-01T09:00Z", ["05-04T09:00", "05-05T09:00", "05-06T09:00"]),
        ("0 9 * * MON", "Asia/Tokyo", "2026-05-01T00:00Z", ["05-04T00:00", "05-11T00:00", "05-18T00:00"]),
        ("59 23 31 12 *", "UTC", "2026-12-31T23:58:59.9Z", ["12-31T23:59", "12-31T23:59", "12-31T23:59"]),
        # Daylight saving time begins and ends in Berlin: nine o'clock stays nine o'clock.
        ("0 9 * * *", "Europe/Berlin", "2026-03-27T12:00Z", ["03-28T08:00", "03-29T07:00", "03-30T07:00"]),
        ("0 9 * * *", "Europe/Berlin", "2026-10-24T12:00Z", ["10-25T08:00", "10-26T08:00", "10-27T08:00"]),
        # A time that is skipped fires after the gap, one that comes twice fires once.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["03-29T01:00", "03-30T00:30", "03-31T00:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00Z", ["10-25T00:30", "10-26T01:30", "10-27T01:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30Z", ["10-26T01:30", "10-27T01:30", "10-28T01:30"]),
        ("0,30 1-3 * * *", "America/New_York", "2026-11-01T05:00Z",
         ["11-01T05:30", "11-01T07:00", "11-01T07:30"]),
        # Every half hour is every half hour.
        ("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:00Z", ["10-25T00:30", "10-25T01:00", "10-25T01:30"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:30Z", ["03-29T01:00", "03-29T01:30", "03-29T02:00"]),
    ],
)  # fmt: skip
def test_firings(expression: str, timezone: str, after: str, expected: list[str]) -> None:
    assert firings(expression, timezone, after) == expected


@pytest.mark.parametrize("expression", ["0 9 * * 1-5", "*/5 0-6,20 1,15 */2 SUN", "0 0 29 2 *", "0 0 L * *"])
def test_valid(expression: str) -> None:
    assert has_five_fields(expression)
    assert is_valid(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "a b c d e", "*/0 * * * *", "1-0-2 * * * *",
        "1.5 * * * *",
        "1,,2 * * * *", "0 0 30 2 *", "R R * * *", "H 9 * * *", "0 R(1-3) * * *", "r 9 * * *", "٣ * * * *",
    ],
)  # fmt: skip
def test_invalid(expression: str) -> None:
    assert has_five_fields(expression)
    assert not is_valid(expression)


@pytest.mark.parametrize("expression", ["", "@daily", "* * * *", "0 0 9 * * 1", "* * * * * *"])
def test_not_five_fields(expression: str) -> None:
    assert not has_five_fields(expression)


def test_timezones() -> None:
    assert all(map(is_timezone, ["UTC", "Europe/Berlin", "America/Argentina/Ushuaia", "Etc/GMT+5"]))
    for name in ("", "Moon/Base", "utc", "Europe", "../UTC", "/etc/localtime", "localtime", "CEST"):
        assert not is_timezone(name)
