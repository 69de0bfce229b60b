"""Reading of server-sent events and other lines from a byte stream (run-lifecycle §7.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class Lines:
    """Cuts chunks of bytes into lines. Only `\\n` and `\\r\\n` end a line: JSON text may hold U+2028 and the like."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The lines that are complete now, without their ends."""
        first, *others = chunk.split(b"\n")
        self._pieces.append(first)
        for piece in others:
            yield self._take()
            self._pieces.append(piece)

    def rest(self) -> str:
        """What came after the last line end."""
        return self._take()

    @property
    def partial(self) -> bool:
        """Whether the last line has no end yet."""
        return any(self._pieces)

    def _take(self) -> str:
        line = b"".join(self._pieces)
        self._pieces.clear()
        return line.removesuffix(b"\r").decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Frame:
    """One server-sent event; `event` is "message" unless the server named another."""

    event: str
    data: str
    id: str | None


class Parser:
    """Collects lines into frames. A frame that the connection's end cuts short is never given out."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._start = True
        self._clear()

    def _clear(self) -> None:
        self._event = ""
        self._data: list[str] = []
        self._id: str | None = None

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """The frames that are complete now."""
        for text in self._lines.feed(chunk):
            line = text.removeprefix("\ufeff") if self._start else text
            self._start = False
            if line:
                self._field(line)
                continue
            if self._data:
                yield Frame(self._event or "message", "\n".join(self._data), self._id)
            self._clear()

    @property
    def partial(self) -> bool:
        """Whether a frame has begun that is not complete."""
        return self._lines.partial or bool(self._data) or self._id is not None

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        # Comments have an empty name; `retry` is not ours to obey: the delays are the client's own.
