"""Reading what a sandboxed program writes: bounded memory, however much it is."""

from __future__ import annotations

import asyncio

from taskyard.sandbox.provider import LINE_BYTES

READ_AHEAD = 64 * 1024
"""The transport stops reading at twice this much."""


class LineReader(asyncio.StreamReader):
    """A StreamReader that reads little ahead, and still returns lines of up to LINE_BYTES.

    The limit of a StreamReader is both: the longest line, and half of what it buffers while nobody
    reads. Here a long line is collected, in `_head`, only while somebody reads it.
    """

    def __init__(self, line_bytes: int = LINE_BYTES) -> None:
        super().__init__(limit=READ_AHEAD)
        self._line_bytes = line_bytes
        self._head = bytearray()

    async def readuntil(self, separator: bytes = b"\n") -> bytes:  # type: ignore[override]  # tuples: 3.13 only
        """As the original; LimitOverrunError beyond the longest line, whose begin is dropped then."""
        while True:
            try:
                rest = await super().readuntil(separator)
            except asyncio.LimitOverrunError as error:
                if len(self._head) + error.consumed > self._line_bytes:
                    self._head.clear()
                    raise
                self._head += await super().readexactly(error.consumed)
            except asyncio.IncompleteReadError as error:
                raise asyncio.IncompleteReadError(self._take() + error.partial, None) from None
            else:
                return self._take() + rest

    async def read(self, n: int = -1) -> bytes:
        """As the original."""
        if n < 0:
            rest = await super().read()
            return self._take() + rest
        return self._take(n) if self._head else await super().read(n)

    async def readexactly(self, n: int) -> bytes:
        """As the original."""
        missing = n - len(self._head)
        if missing <= 0:
            return self._take(n)
        try:
            rest = await super().readexactly(missing)
        except asyncio.IncompleteReadError as error:
            raise asyncio.IncompleteReadError(self._take() + error.partial, n) from None
        return self._take() + rest

    def at_eof(self) -> bool:
        """As the original."""
        return not self._head and super().at_eof()

    def _take(self, n: int | None = None) -> bytes:
        taken = bytes(self._head[:n])
        del self._head[:n]
        return taken


class Tail:
    """The last bytes of a stream, as text."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._bytes = b""

    async def drain(self, reader: asyncio.StreamReader) -> None:
        """Read to the end of the stream."""
        while chunk := await reader.read(READ_AHEAD):
            self._bytes = (self._bytes + chunk)[-self._size :]

    def text(self) -> str:
        """What is kept; bytes that are no UTF-8 become U+FFFD."""
        return self._bytes.decode("utf-8", "replace")
