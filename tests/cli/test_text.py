"""Text fit for a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from taskyard.cli.text import Prose, clean, crop, fit, output_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m and \x1b[2Kgone", "red and gone"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\link", "alink"),
        ("bell\x07 back\x08 null\x00 del\x7f c1\x9b31m", "bell back null del c131m"),
        ("a\u202eb\u2066c", "abc"),
        ("tab\tand\nline", "tab    and\nline"),
        ("half \ud83d a pair", "half ? a pair"),
        ("\x1b", ""),
    ],
)
def test_clean(text: str, shown: str) -> None:
    assert clean(text) == shown


@given(st.text())
def test_clean_leaves_nothing_that_steers(text: str) -> None:
    assert not any(ord(char) < 32 and char != "\n" for char in clean(text))
    assert "\x9b" not in clean(text)


@given(st.text(), st.integers(min_value=4, max_value=40))
def test_fit_and_crop_keep_the_width(text: str, width: int) -> None:
    for shown in (fit(text.replace("\n", " "), width), crop(text, width)):
        assert cell_len(shown) <= width
        assert "\n" not in shown


def test_crop_and_fit() -> None:
    assert crop("  first\nsecond", 20) == "first …"
    assert crop("only", 20) == "only"
    assert fit("    indented and much too long", 12) == "    indente…"
    assert fit("漢字漢字漢字", 7) == "漢字漢…"


def test_output_lines() -> None:
    assert output_lines("\na\nb\n", 1, 1) == ["a", "b"]
    assert output_lines("10%\r50%\r100%\r\ndone", 3, 3) == ["100%", "done"]
    assert output_lines("\n".join("abcdefg"), 2, 2) == ["a", "b", "… 3 more lines", "f", "g"]
    assert output_lines("\n".join("abcde"), 2, 2) == list("abcde")  # one line left out gains nothing


def wrapped(pieces: list[str], width: int) -> str:
    out: list[str] = []
    prose = Prose(out.append, width, "> ", "  ")
    for piece in pieces:
        prose.feed(piece)
    prose.end()
    return "".join(out)


def test_prose() -> None:
    text = "one two three four\n\n  code  x\nlast"
    assert wrapped([text], 12) == "> one two\n  three four\n\n    code  x\n  last\n"


@given(st.text(alphabet="ab \n漢", max_size=60), st.integers(8, 30), st.data())
def test_prose_does_not_depend_on_where_it_is_cut(text: str, width: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    words = text.split()
    if any(cell_len(word) > width - 2 for word in words):
        return  # too long for a line: written as soon as no break is in sight
    assert wrapped(pieces, width) == wrapped([text], width)
    assert wrapped(pieces, width).replace("> ", "", 1).split() == words
