"""Headers made of what people named: types, file names, ranges."""

from __future__ import annotations

import pytest

from taskyard.objects.api import byte_range
from taskyard.objects.interface import attachment, media_type


@pytest.mark.parametrize(
    "good", ["text/plain", "text/plain; charset=utf-8", "application/vnd.a+json;v=1", 'a/b; c="d e"']
)
def test_media_types_that_stay(good: str) -> None:
    assert media_type(good) == good


@pytest.mark.parametrize("bad", [None, "", "text", "text/plain\r\nX: y", "text/ü", "a/b; c", "a/b,c/d"])
def test_media_types_that_do_not(bad: str | None) -> None:
    assert media_type(bad) == "application/octet-stream"


def test_file_names() -> None:
    assert attachment("a.md") == "attachment; filename=\"a.md\"; filename*=UTF-8''a.md"
    assert (
        attachment('a"b\r\nü%.md')
        == "attachment; filename=\"a_b____.md\"; filename*=UTF-8''a%22b%0D%0A%C3%BC%25.md"
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 0)),
        ("bytes=2-", (2, 9)),
        ("bytes=2-99", (2, 9)),
        ("bytes=-3", (7, 9)),
        ("bytes=-99", (0, 9)),
        ("bytes=10-", (10, 9)),
        ("bytes=-0", (10, 9)),
        ("", None),
        ("bytes=-", None),
        ("bytes=5-2", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=٣-", None),
    ],
)
def test_ranges(header: str, expected: tuple[int, int] | None) -> None:
    assert byte_range(header, 10) == expected


def test_range_of_nothing() -> None:
    first, last = byte_range("bytes=-5", 0) or (0, 0)
    assert first > last
