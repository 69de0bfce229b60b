"""Text of agents and servers made fit for a terminal: nothing in it may steer the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
# C0 without tab and newline, C1, and the marks that change the direction of text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Text without escape sequences and control characters; tabs become four blanks."""
    text = _CONTROLS.sub("", _ESCAPES.sub("", text)).replace("\t", "    ")
    return text.encode("utf-8", "replace").decode()


def fit(line: str, width: int) -> str:
    """A line cut to a width in cells."""
    line = clean(line).rstrip()
    if cell_len(line) <= width:
        return line
    while line and cell_len(line) > width - 1:
        line = line[: len(line) - max(1, (cell_len(line) - width + 1) // 2)]
    return line.rstrip() + "…"


def crop(text: str, width: int) -> str:
    """The first line of a text, cut to a width; `…` stands for what is left out."""
    line, _, rest = text.strip().partition("\n")
    return fit(line, width - 2).removesuffix("…") + " …" if rest else fit(line, width)


def output_lines(text: str, head: int, tail: int) -> list[str]:
    """Lines of a program's output, the middle left out. Of an overwritten line, what was last to be seen."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.strip("\n").split("\n")]
    if len(lines) <= head + tail + 1:
        return lines
    return [*lines[:head], f"… {len(lines) - head - tail} more lines", *lines[len(lines) - tail :]]


class Prose:
    """Wraps text at words while it arrives in pieces cut anywhere."""

    def __init__(self, write: Callable[[str], None], width: int, first: str = "", indent: str = "") -> None:
        """`first` and `indent` stand before the first and each further line; `width` is in cells."""
        self._write = write
        self._width = width
        self._margin = first
        self._indent = indent
        self._pending = ""
        self._column = 0
        self._blank = ""

    def feed(self, text: str) -> None:
        self._pending += clean(text)
        cut = max(self._pending.rfind(" "), self._pending.rfind("\n")) + 1
        if len(self._pending) - cut > self._width:  # no place to break in sight
            cut = len(self._pending)
        ready, self._pending = self._pending[:cut], self._pending[cut:]
        self._put(ready)

    def end(self) -> None:
        """Write what was held back, and end the line."""
        self._put(self._pending)
        self._pending = ""
        if self._column:
            self._write("\n")
            self._column = 0

    def _put(self, text: str) -> None:
        for piece in re.findall(r"\n| +|[^ \n]+", text):
            if piece == "\n":
                self._write("\n")
                self._column, self._blank, self._margin = 0, "", self._indent
            elif piece[0] == " ":
                self._blank += piece
            else:
                self._word(piece)

    def _word(self, word: str) -> None:
        length = cell_len(word)
        if self._column and self._column + len(self._blank) + length > self._width:
            self._write("\n")
            self._column, self._blank, self._margin = 0, "", self._indent
        before = self._blank if self._column else self._margin + self._blank
        self._write(before + word)
        self._column += len(before) + length
        self._blank = ""
