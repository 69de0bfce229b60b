"""The server's end of a carrier: makes a Process of a command whose streams come over one pair of byte streams."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from taskyard.sandbox import carrier
from taskyard.sandbox.carrier import EXIT, GO, LOST, OPEN, PIECE, READY, SIGNAL, START, STDIO, Mux, relay
from taskyard.sandbox.provider import (
    STDERR_BYTES,
    Exit,
    KilledError,
    ListenerHandler,
    Reason,
    SandboxError,
)
from taskyard.sandbox.streams import Meter, Streams, Tail, connect, reader_of, writer_of

SOURCE = Path(carrier.__file__).read_bytes()
COMMAND = ("python3", "-I", "-S", "-c", carrier.BOOT % (len(SOURCE), len(SOURCE)))
"""What a sandbox runs to carry a command; standard input first takes SOURCE."""
START_S = 60.0
MAX_STATUS = 255
MAX_END = 1024
"""Bytes in which a carrier tells how its command ended."""
SIGKILL_STATUS = 128 + 9


class Wire(Protocol):
    """A carrier that runs in a sandbox, as its provider reaches it."""

    async def read(self) -> tuple[int, bytes] | None:
        """Some bytes of its output: 1 and the frames, or 2 and standard error. None at the end of both."""

    async def write(self, data: bytes) -> None:
        """To its standard input. Raises OSError when that is gone."""

    async def kill(self) -> None:
        """End the carrier and everything it started, by force; returns when they are gone. Idempotent."""

    async def end(self) -> tuple[int, Reason]:
        """After its output has ended: exit status, and how it came to that. Frees what the wire holds."""


@dataclass(frozen=True)
class Order:
    """A command to carry. env: the whole environment. seconds: how long it may run, also without the server."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    seconds: float | None = None


@dataclass(frozen=True)
class _Exit:
    """What the carrier says of the command's end."""

    code: int
    timeout: bool


def _exit_of(data: bytes) -> _Exit:
    """Raises ValueError: anybody in the sandbox may have written it."""
    try:
        found = _Exit(**json.loads(data))
    except (TypeError, RecursionError):
        raise ValueError("an end that is none") from None
    if type(found.code) is not int or not 0 <= found.code <= MAX_STATUS:
        raise ValueError("an exit status that cannot be")
    return found


class CarriedProcess:
    """See provider.Process. Made by `start`."""

    pid = 0

    def __init__(self, wire: Wire, streams: Streams, theirs: Sequence[int], max_output: int | None) -> None:
        self._wire = wire
        self._streams = streams
        self._mux = Mux(wire.write, self._took)
        self._stdio = self._mux.open(STDIO)
        self._tail = Tail(STDERR_BYTES)
        self._tail.meter = streams.stdout.meter = Meter(max_output, lambda: self._keep(self.kill("output")))
        self._ready = asyncio.Event()
        self._exit: _Exit | None = None
        self._why: Reason | None = None
        """For what it was ended by force."""
        self._scratch = -1
        self._gateway = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self.stdin = streams.stdin
        self.stdout: asyncio.StreamReader = streams.stdout
        self._end = asyncio.create_task(self._live(theirs), name="carried command")

    @property
    def closed(self) -> bool:
        """Ended, with all output read or given up."""
        return self._end.done() and self._streams.closed

    def stderr_tail(self) -> str:
        return self._tail.text()

    def remark(self, text: str) -> None:
        self._tail.remark(text)

    async def wait(self) -> Exit:
        return await asyncio.shield(self._end)

    async def kill(self, why: Reason = "killed") -> None:
        """See provider.Process. why: what wait() tells as the reason."""
        if not self._end.done():
            self._why = self._why or why
            await self._wire.kill()
        await self.wait()
        self._streams.close()

    async def terminate(self, grace_s: float) -> None:
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(grace_s):
                await self._mux.send(SIGNAL, 15)
                await self.wait()
        await self.kill()

    async def begin(self, order: Order, on_listener: ListenerHandler | None, scratch: Path) -> None:
        """Start the command. Raises SandboxError, KilledError."""
        wanted = {
            "argv": list(order.argv),
            "env": dict(order.env),
            "cwd": order.cwd,
            "seconds": order.seconds,
            "stdin": self.stdin is not None,
            "listen": on_listener is not None,
        }
        try:
            async with asyncio.timeout(START_S):
                await self._wire.write(SOURCE)
                await self._mux.send(START, 0, json.dumps(wanted).encode())
                ready = asyncio.ensure_future(self._ready.wait())
                try:
                    await asyncio.wait({ready, self._end}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    ready.cancel()
                if self._ready.is_set():
                    if on_listener is not None:
                        await on_listener(self._listen(scratch))
                    await self._mux.send(GO)
                    return
        except TimeoutError:
            raise SandboxError(f"the sandbox has not started its command for {START_S:g} seconds") from None
        except OSError as error:
            await self._wire.kill()
            await self._fail(error)
        await self._fail(None)

    async def _fail(self, cause: BaseException | None) -> NoReturn:
        end = await self.wait()
        raise (KilledError if end.reason == "killed" else SandboxError)(
            f"the sandbox does not start: {end.stderr_tail.strip() or f'exit status {end.code}'}"
        ) from cause

    def _listen(self, scratch: Path) -> socket.socket:
        """The gateway's listening socket; connections made inside are made to it again, from here."""
        self._scratch = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # By the descriptor, since the path of a socket has 107 bytes at most.
        self._gateway = f"/proc/self/fd/{self._scratch}/{secrets.token_hex(8)}.gateway"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._gateway)
        listener.listen(128)
        listener.setblocking(False)
        return listener

    # --- what comes from inside ---

    def _took(self, kind: int, number: int, data: bytes) -> None:
        if kind == READY and not self._ready.is_set():
            self._ready.set()
        elif kind == EXIT:
            if self._exit is not None or len(data) > MAX_END:
                raise ValueError("a second end, or a long one")
            self._exit = _exit_of(data)
            self._keep(self._hear())
        elif kind == OPEN:
            if not self._gateway:
                raise ValueError("it has no way out")
            self._keep(self._connect(self._mux.open(number)))
        else:
            raise ValueError("a frame that is not for the server")

    async def _hear(self) -> None:
        """All has arrived, so the carrier may end."""
        with suppress(OSError):
            await self._mux.send(GO)

    async def _connect(self, channel: carrier.Channel) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(self._gateway)
        except OSError:
            await channel.abort()
        else:
            await relay(channel, reader, writer)
        finally:
            self._mux.forget(channel)

    async def _live(self, theirs: Sequence[int]) -> Exit:
        """Carry everything until the command has ended."""
        self._keep(self._fill_stdout(theirs[0]))
        os.close(theirs[1])
        feeding = self._keep(self._drain_stdin(theirs[2])) if len(theirs) > 2 else None
        try:
            while (found := await self._wire.read()) is not None:
                stream, data = found
                if stream == 1:
                    self._mux.feed(data)
                else:
                    self._tail.add(data)
        except ValueError as error:
            self._tail.add(f"what carries the streams of the sandbox broke the rules: {error}".encode())
            self._exit = None
            await self._wire.kill()
        except OSError as error:
            self._tail.add(f"the connection to the sandbox broke: {error}".encode())
            await self._wire.kill()
        self._mux.lose()
        code, reason = await self._wire.end()
        if self.stdin is not None and not self.stdin.is_closing():
            self.stdin.transport.abort()  # what was not written has no reader any more
        if feeding is not None:
            feeding.cancel()
        if self._scratch >= 0:
            with suppress(OSError):
                os.unlink(self._gateway)  # noqa: PTH108 - by the descriptor's path
            os.close(self._scratch)
        if self._exit is not None:
            code = self._exit.code
            if self._exit.timeout:
                reason = "timeout"
            elif code != SIGKILL_STATUS:
                reason = "exited"
        elif code == LOST:
            reason = "killed"  # by a connection that broke: it is not the command's fault
        return Exit(code, self._why or reason, self.stderr_tail())

    async def _fill_stdout(self, descriptor: int) -> None:
        writer = await writer_of(descriptor)
        try:
            while data := await self._stdio.receive():
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # nobody reads any more, or nothing more comes
        finally:
            writer.close()

    async def _drain_stdin(self, descriptor: int) -> None:
        reader = await reader_of(descriptor)
        with suppress(OSError):
            while data := await reader.read(PIECE):
                await self._stdio.send(data)
            await self._stdio.end()

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def start(
    wire: Wire,
    order: Order,
    *,
    stdin: bool,
    on_listener: ListenerHandler | None,
    scratch: Path,
    max_output: int | None,
) -> CarriedProcess:
    """Start a command over a wire whose carrier runs, and own the wire.

    scratch: a folder for the gateway's socket. Raises SandboxError, KilledError; then the carrier is gone.
    """
    try:
        streams, theirs = await connect(stdin=stdin)
    except BaseException:
        await asyncio.shield(_give_up(wire))
        raise
    process = CarriedProcess(wire, streams, theirs, max_output)
    try:
        await process.begin(order, on_listener, scratch)
    except BaseException:
        await asyncio.shield(process.kill())
        raise
    return process


async def _give_up(wire: Wire) -> None:
    await wire.kill()
    await wire.end()
