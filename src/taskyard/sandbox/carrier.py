"""A program's streams and its connections to the gateway over one pair of byte streams: both ends.

Where no descriptor can be handed out of a sandbox (another machine, a pod, a kernel of its own), this file itself
runs inside, between the server and the command: `python3 -I -S -c BOOT`, then its own source on standard input.
It starts the command as it is told, carries its standard input and output, and listens at 127.0.0.1:3128; each
connection made there becomes a channel. Command and environment come in a frame, so neither an engine's
records nor the list of processes ever show them.

The two ends trust each other in nothing but sizes: what an agent could do to this program, it can do to its own
streams anyway. Standard library only, for Python 3.9 and later: the interpreter is the image's.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

HEADER = struct.Struct("!BII")
"""Kind of frame, channel, length of what follows."""
START, READY, GO, SIGNAL, EXIT, OPEN, DATA, CREDIT, EOF, CLOSE = range(10)
STDIO = 0
"""The channel of the command's standard input and output."""
WINDOW = 256 * 1024
"""Bytes of a channel that may be under way in one direction."""
PIECE = 32 * 1024
MAX_FRAME = 4 * 1024 * 1024
MAX_CHANNELS = 512
LATE = 24 * WINDOW
"""Bytes of frames that can still be under way to a channel when one end has done with it: a window of data and a window
of credit, byte by byte, each with its header."""
MOST_LEFT = 1024 * 1024
"""Bytes that a pipe may hold when all that wrote to it is gone."""
LINGER_S = 10.0
"""The server has taken note of a command's end within this time."""
LOST = 125
"""Exit status of a carrier that has lost the server, or got nonsense from it."""
LISTENER = ("127.0.0.1", 3128)
BOOT = "import os\nb=b''\nwhile len(b)<%d:b+=os.read(0,%d-len(b)) or os._exit(125)\nexec(b)"
"""Takes the length of the source, twice."""


class Channel:
    """One two-way stream. A side that is not read stops its sender, and nobody else."""

    def __init__(self, mux: Mux, number: int) -> None:
        self._mux = mux
        self.number = number
        self._credit = WINDOW
        self._room = asyncio.Event()
        self._inbox: list[bytes] = []
        self._pending = 0
        self._news = asyncio.Event()
        self._ended = self._closed = self._broken = False

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises ConnectionError when the channel or the connection is gone."""
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            while self._credit < len(piece) and not self._broken:
                self._room.clear()
                await self._room.wait()
            if self._broken:
                raise ConnectionAbortedError
            self._credit -= len(piece)
            await self._mux.send(DATA, self.number, piece)

    async def receive(self) -> bytes:
        """Some bytes; none at the end. Raises ConnectionError when the channel or the connection is gone."""
        while not self._inbox:
            if self._broken:
                raise ConnectionAbortedError
            if self._ended:
                return b""
            self._news.clear()
            await self._news.wait()
        data = b"".join(self._inbox)
        self._inbox.clear()
        self._pending = 0
        with suppress(OSError):  # no more will come, but this has
            await self._mux.send(CREDIT, self.number, len(data).to_bytes(4, "big"))
        return data

    async def end(self) -> None:
        """Nothing more is sent."""
        if not self._broken:
            await self._mux.send(EOF, self.number)

    async def abort(self) -> None:
        """Give the channel up, in both directions."""
        if not self._broken:
            self.lose()
            await self._mux.send(CLOSE, self.number)

    def lose(self) -> None:
        """Nothing goes in either direction any more."""
        self._broken = True
        self._room.set()
        self._news.set()

    def took(self, kind: int, data: bytes) -> None:
        """A frame of this channel has come. Raises ValueError for one that breaks the rules.

        None may come for nothing, so that the other end cannot keep this one busy with them.
        """
        if kind == DATA:
            self._pending += len(data)
            if self._pending > WINDOW or self._ended:
                raise ValueError("more data than was allowed")
            if not data:
                raise ValueError("data without any")
            self._inbox.append(data)
        elif kind == CREDIT:
            credit = int.from_bytes(data, "big")
            if len(data) != 4 or not 0 < credit <= WINDOW - self._credit:
                raise ValueError("credit for what was not sent")
            self._credit += credit
        elif data or self._closed or (kind == EOF and self._ended):
            raise ValueError("a second end of a channel")
        elif kind == EOF:
            self._ended = True
        else:
            self._closed = True
            self.lose()
        self._room.set()
        self._news.set()


class Mux:
    """Frames to and from the other end. `write` sends bytes; `on_frame` gets what belongs to no open channel."""

    def __init__(
        self, write: Callable[[bytes], Awaitable[object]], on_frame: Callable[[int, int, bytes], None]
    ) -> None:
        self._write = write
        self._on_frame = on_frame
        self._lock = asyncio.Lock()
        self._buffer = bytearray()
        self._channels: dict[int, Channel] = {}
        self._last = -1
        self._late = 0
        """Bytes that may still come for channels that are forgotten."""

    def open(self, number: int) -> Channel:
        """The channel of this number, new: numbers rise. Raises ValueError for one that was there, or one too many."""
        if number <= self._last or len(self._channels) >= MAX_CHANNELS:
            raise ValueError("no more channels")
        self._last = number
        self._channels[number] = Channel(self, number)
        return self._channels[number]

    def forget(self, channel: Channel) -> None:
        """What still comes for it is dropped."""
        if self._channels.pop(channel.number, None) is not None:
            self._late += LATE

    async def send(self, kind: int, number: int = 0, data: bytes = b"") -> None:
        """Send one frame. Raises OSError when the connection is gone."""
        async with self._lock:
            await self._write(HEADER.pack(kind, number, len(data)) + data)

    def feed(self, data: bytes) -> None:
        """Take what has come from the other end. Raises ValueError when that breaks the rules."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            kind, number, size = HEADER.unpack_from(self._buffer)
            if size > MAX_FRAME:
                raise ValueError("a frame is too large")
            if len(self._buffer) < HEADER.size + size:
                return
            content = bytes(self._buffer[HEADER.size : HEADER.size + size])
            del self._buffer[: HEADER.size + size]
            channel = self._channels.get(number)
            if kind in (DATA, CREDIT, EOF, CLOSE):
                if channel is not None:
                    channel.took(kind, content)
                else:
                    self._drop(number, HEADER.size + size)
            else:
                self._on_frame(kind, number, content)

    def _drop(self, number: int, size: int) -> None:
        self._late -= size
        if number > self._last or self._late < 0:
            raise ValueError("a frame of a channel that is not open")

    def lose(self) -> None:
        """The connection is gone: so are all channels."""
        for channel in self._channels.values():
            channel.lose()


async def relay(channel: Channel, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes between a channel and a connection until both directions have ended."""

    async def out() -> None:
        while True:
            data = await reader.read(PIECE)
            if not data:
                break
            await channel.send(data)
        await channel.end()

    async def back() -> None:
        while True:
            data = await channel.receive()
            if not data:
                break
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    tasks = [asyncio.ensure_future(out()), asyncio.ensure_future(back())]
    try:
        await asyncio.gather(*tasks)
    except OSError:
        writer.transport.abort()
        with suppress(OSError):
            await channel.abort()
    finally:
        for task in tasks:
            task.cancel()
        writer.close()


class _Inside:
    """The end inside of the sandbox."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._go = asyncio.Event()
        self._heard = asyncio.Event()
        self._over = asyncio.Event()
        """The command has ended, and all that it started."""
        self._order: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Future[None]] = set()
        self._opened = 0
        self._timed_out = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb", 0))
        write = await _writer(1)
        self._complain = await _writer(2)
        self._mux = Mux(write, self._took)
        self._stdio = self._mux.open(STDIO)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_signal_handler(signal.SIGTERM, self._signal, signal.SIGTERM)
        work = asyncio.ensure_future(self._work())
        feeding = asyncio.ensure_future(self._feed(reader))
        await asyncio.wait({work, feeding}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            _kill_all()  # the server is gone, or breaks the rules
            return LOST
        return work.result()

    async def _feed(self, reader: asyncio.StreamReader) -> None:
        while True:
            data = await reader.read(PIECE)
            if not data:
                return
            self._mux.feed(data)

    def _took(self, kind: int, number: int, data: bytes) -> None:
        if kind == START:
            self._order.set_result(json.loads(data))
        elif kind == GO:
            (self._heard if self._go.is_set() else self._go).set()
        elif kind == SIGNAL:
            self._signal(number)

    def _signal(self, number: int) -> None:
        if self._child is not None and not self._status.done():
            os.kill(self._child.pid, number)

    async def _work(self) -> int:
        order = await self._order
        if order["listen"]:
            await asyncio.start_server(self._connected, *LISTENER, backlog=128)
        await self._mux.send(READY)
        await self._go.wait()
        if order["seconds"] is not None:
            asyncio.get_running_loop().call_later(order["seconds"], self._end_in_time)
        try:
            code = await self._execute(order)
        except OSError as error:
            print(f"{error.filename or order['argv'][0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
            code = 127 if isinstance(error, FileNotFoundError) else 126
            await self._stdio.end()
        await self._mux.send(EXIT, 0, json.dumps({"code": code, "timeout": self._timed_out}).encode())
        with suppress(asyncio.TimeoutError):
            # Some engines throw away what is under way when a program ends: not before all has arrived.
            await asyncio.wait_for(self._heard.wait(), LINGER_S)
        return code

    async def _execute(self, order: dict[str, Any]) -> int:
        loop = asyncio.get_running_loop()
        self._child = child = subprocess.Popen(  # noqa: ASYNC220 - nothing else is to be done meanwhile
            order["argv"],
            env=order["env"],
            cwd=order["cwd"],
            stdin=subprocess.PIPE if order["stdin"] else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        if child.stdin is not None:
            transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, child.stdin)
            self._keep(self._fill(asyncio.StreamWriter(transport, protocol, None, loop)))
        assert child.stdout is not None
        assert child.stderr is not None
        output = asyncio.ensure_future(self._drain(child.stdout.fileno(), self._stdio.send))
        errors = asyncio.ensure_future(self._drain(child.stderr.fileno(), self._complain))
        code = await self._status
        _kill_all()
        self._over.set()
        await output
        await self._stdio.end()
        await errors
        return code

    async def _drain(self, descriptor: int, send: Callable[[bytes], Awaitable[object]]) -> None:
        """Carry what comes by a pipe to its end, or until all is carried that was in it when the command was over.

        The pipe may not end then: the command can have given its other end to somebody else in the sandbox.
        """
        loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        left = MOST_LEFT
        while left > 0:
            over = self._over.is_set()
            try:
                data = os.read(descriptor, PIECE)
            except BlockingIOError:
                if over:
                    return
                more = asyncio.Event()
                loop.add_reader(descriptor, more.set)
                waits = [asyncio.ensure_future(event.wait()) for event in (more, self._over)]
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    loop.remove_reader(descriptor)
                    for wait in waits:
                        wait.cancel()
                continue
            if not data:
                return
            if over:
                left -= len(data)
            await send(data)

    async def _fill(self, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                data = await self._stdio.receive()
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        except OSError:
            # The command reads no more; what still comes is thrown away, so that nobody waits.
            while await self._stdio.receive():
                pass
        finally:
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._opened += 1
        try:
            channel = self._mux.open(self._opened)
        except ValueError:
            writer.transport.abort()
            return
        try:
            await self._mux.send(OPEN, channel.number)
            await relay(channel, reader, writer)
        finally:
            self._mux.forget(channel)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end_in_time(self) -> None:
        self._timed_out = True
        self._signal(signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._child is not None and pid == self._child.pid:
                signalled = os.WIFSIGNALED(status)
                self._child.returncode = 0  # it is reaped: not for subprocess to wait for
                self._status.set_result(128 + os.WTERMSIG(status) if signalled else os.WEXITSTATUS(status))


async def _writer(descriptor: int) -> Callable[[bytes], Awaitable[None]]:
    """What writes to one of our own pipes, and is done when all is written."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, os.fdopen(os.dup(descriptor), "wb", 0)
    )
    transport.set_write_buffer_limits(0)  # drain() is over when all is written
    writer = asyncio.StreamWriter(transport, protocol, None, loop)

    async def write(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    return write


def _kill_all() -> None:
    """End everything that the command has left: what it started became ours when its parents ended."""
    if os.getpid() == 1:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return
    while True:
        found = _descendants()
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _descendants() -> set[int]:
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:  # noqa: PTH123
                    words = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if words[0] not in "ZX":
                parents[int(name)] = int(words[1])
    found: set[int] = set()
    for pid, parent in parents.items():
        above = parent
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid():
            found.add(pid)
    return found


async def _main() -> int:
    return await _Inside().run()


if __name__ == "__main__":
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans below us become ours
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: our pipes are not for the command
    os._exit(asyncio.run(_main()))
