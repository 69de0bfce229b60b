"""The standard streams of a sandboxed command: bounded memory, however much it writes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import uvloop

from taskyard.sandbox.provider import LINE_BYTES, Process, SandboxError

READ_AHEAD = 64 * 1024
"""The transport stops reading at twice this much."""


class Meter:
    """Counts what a command writes, and says once when it is more than `limit` bytes."""

    def __init__(self, limit: int | None, on_excess: Callable[[], object]) -> None:
        self._left = limit
        self._on_excess = on_excess
        self.exceeded = False

    def count(self, size: int) -> None:
        """So many more bytes were written."""
        if self._left is None or self.exceeded:
            return
        self._left -= size
        if self._left < 0:
            self.exceeded = True
            self._on_excess()


class LineReader(asyncio.StreamReader):
    """A StreamReader that reads little ahead, and still returns lines of up to LINE_BYTES.

    The limit of a StreamReader is both: the longest line, and half of what it buffers while nobody
    reads. Here a long line is collected, in `_head`, only while somebody reads it.
    """

    def __init__(self, line_bytes: int = LINE_BYTES) -> None:
        super().__init__(limit=READ_AHEAD)
        self._line_bytes = line_bytes
        self._head = bytearray()
        self.meter: Meter | None = None

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # bytes are what comes
        """As the original."""
        if self.meter is not None:
            self.meter.count(len(data))
        super().feed_data(data)

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
        self.meter: Meter | None = None

    async def drain(self, reader: asyncio.StreamReader) -> None:
        """Read to the end of the stream."""
        while chunk := await reader.read(READ_AHEAD):
            self.add(chunk)

    def add(self, data: bytes) -> None:
        """This was written, too."""
        if self.meter is not None:
            self.meter.count(len(data))
        self._bytes = (self._bytes + data)[-self._size :]

    def remark(self, text: str) -> None:
        """Add a line of the server's."""
        self._bytes += f"\n{text}\n".encode()

    def text(self) -> str:
        """What is kept; bytes that are no UTF-8 become U+FFFD."""
        return self._bytes.decode("utf-8", "replace")


async def read_all(process: Process, most: int) -> bytes:
    """All that a command writes to standard output. Raises SandboxError when that is more than `most` bytes."""
    output = b""
    while chunk := await process.stdout.read(4096):
        output += chunk
        if len(output) > most:
            raise SandboxError(f"a command in a sandbox says more than {most} bytes")
    return output


@dataclass
class Streams:
    """Our ends of a command's pipes."""

    stdin: asyncio.StreamWriter | None
    stdout: LineReader
    stderr: asyncio.StreamReader
    transports: list[asyncio.BaseTransport]

    def close(self) -> None:
        """Give up what was not read yet."""
        for transport in self.transports:
            transport.close()

    @property
    def closed(self) -> bool:
        return all(transport.is_closing() for transport in self.transports)


class _End:
    """Our end of a pipe, as event loops take it; they close it.

    uvloop closes the descriptor itself, and then the object that it got. With a file that would be a second close of
    the number, and so of whatever another thread has opened under it in between.
    """

    def __init__(self, descriptor: int, loop: asyncio.AbstractEventLoop) -> None:
        self._descriptor = descriptor
        self._closed = isinstance(loop, uvloop.Loop)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)


async def reader_of(descriptor: int) -> asyncio.StreamReader:
    """A reader of one end of a pipe, which it closes at its end."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READ_AHEAD)
    protocol = asyncio.StreamReaderProtocol(reader)
    await loop.connect_read_pipe(partial(_same, protocol), _End(descriptor, loop))
    return reader


async def writer_of(descriptor: int) -> asyncio.StreamWriter:
    """A writer to one end of a pipe; it is to be closed."""
    loop = asyncio.get_running_loop()
    unused = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(unused)
    transport, _ = await loop.connect_write_pipe(partial(_same, protocol), _End(descriptor, loop))
    return asyncio.StreamWriter(transport, protocol, unused, loop)


async def connect(*, stdin: bool) -> tuple[Streams, list[int]]:
    """Make pipes. The other ends, of standard output, error, and input if wanted, are the caller's to close."""
    loop = asyncio.get_running_loop()
    streams = Streams(None, LineReader(), asyncio.StreamReader(limit=READ_AHEAD), [])
    others: list[int] = []
    try:
        for reader in (streams.stdout, streams.stderr):
            ours, other = os.pipe()
            others.append(other)
            protocol = asyncio.StreamReaderProtocol(reader)
            output, _ = await loop.connect_read_pipe(partial(_same, protocol), _End(ours, loop))
            streams.transports.append(output)
        if stdin:
            other, ours = os.pipe()
            others.append(other)
            unused = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(unused)
            input_, _ = await loop.connect_write_pipe(partial(_same, protocol), _End(ours, loop))
            streams.transports.append(input_)
            streams.stdin = asyncio.StreamWriter(input_, protocol, unused, loop)
    except BaseException:
        streams.close()
        for other in others:
            os.close(other)
        raise
    return streams, others


def _same(protocol: asyncio.StreamReaderProtocol) -> asyncio.StreamReaderProtocol:
    return protocol
