"""Commands whose streams are carried, both ends for real; the wire between them is a command of a sandbox."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from taskyard.sandbox import carried
from taskyard.sandbox.bubblewrap import BubblewrapSandbox
from taskyard.sandbox.carried import CarriedProcess, Order
from taskyard.sandbox.carrier import (
    CLOSE,
    CREDIT,
    DATA,
    EOF,
    EXIT,
    HEADER,
    LATE,
    MAX_FRAME,
    OPEN,
    READY,
    STDIO,
    WINDOW,
    Mux,
)
from taskyard.sandbox.provider import Process, Reason, SandboxError
from tests.support.served import FETCH, Served

ENV = {"PATH": "/usr/bin:/bin"}


class PipeWire:
    """A wire over the streams of a command in a bubblewrap sandbox."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._said = False

    async def read(self) -> tuple[int, bytes] | None:
        if data := await self._process.stdout.read(65536):
            return 1, data
        if self._said:
            return None
        self._said = True
        return 2, (await self._process.wait()).stderr_tail.encode()

    async def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        await self._process.stdin.drain()

    async def kill(self) -> None:
        await self._process.kill()

    async def end(self) -> tuple[int, Reason]:
        end = await self._process.wait()
        return end.code, end.reason


async def carry(
    sandbox: BubblewrapSandbox,
    *argv: str,
    env: Mapping[str, str] = ENV,
    cwd: str = "/tmp/workspace",
    seconds: float | None = None,
    **how: Any,
) -> CarriedProcess:
    wire = PipeWire(await sandbox.exec(carried.COMMAND, stdin=True))
    order = Order(argv, env, cwd, seconds)
    options: dict[str, Any] = {"stdin": False, "on_listener": None, "max_output": None, **how}
    return await carried.start(wire, order, scratch=sandbox.scratch, **options)


async def ended(process: CarriedProcess) -> tuple[bytes, int, str, str]:
    async with asyncio.timeout(60):
        output = await process.stdout.read()
        end = await process.wait()
    await process.kill()
    return output, end.code, end.reason, end.stderr_tail


async def test_output_environment_and_exit_code(sandbox: BubblewrapSandbox) -> None:
    script = "pwd; env; echo wrong >&2; ls /proc/self/fd; exit 7"
    output, code, reason, tail = await ended(
        await carry(sandbox, "sh", "-c", script, env={**ENV, "A": "b\nc"}, cwd="/tmp")
    )
    assert (code, reason, tail) == (7, "exited", "wrong\n")
    lines = output.decode().splitlines()
    assert lines[0] == "/tmp"
    assert {"A=b", "c", "PATH=/usr/bin:/bin"} <= set(lines)
    # The fourth is what `ls` opens.
    assert [line for line in lines if line.isdigit()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("argv", "cwd", "code"), [(["no-such-program"], "/tmp", 127), (["true"], "/nowhere", 127)]
)
async def test_what_cannot_be_started(
    sandbox: BubblewrapSandbox, argv: Sequence[str], cwd: str, code: int
) -> None:
    output, found, reason, tail = await ended(await carry(sandbox, *argv, cwd=cwd))
    assert (output, found, reason) == (b"", code, "exited")
    assert (argv[0] if cwd == "/tmp" else cwd) in tail


async def test_much_goes_in_and_out(sandbox: BubblewrapSandbox) -> None:
    process = await carry(sandbox, "cat", stdin=True)
    assert process.stdin is not None
    data = bytes(range(256)) * 20_000
    process.stdin.write(data)
    reading = asyncio.create_task(process.stdout.read())
    await process.stdin.drain()
    process.stdin.close()
    async with asyncio.timeout(60):
        assert await reading == data
    assert (await ended(process))[1:3] == (0, "exited")


async def test_the_command_that_nobody_reads_waits_and_others_go_on(sandbox: BubblewrapSandbox) -> None:
    """A full channel stops its sender only: the gateway still answers."""
    served = Served()
    script = f'yes & sleep 0.3; python3 -c "{FETCH}" >&2; sleep 600'
    process = await carry(sandbox, "sh", "-c", script, on_listener=served.serve)
    async with asyncio.timeout(60):
        await served.asked.wait()
        await process.stdout.readexactly(10 * WINDOW)
        await process.kill()
    await served.close()


async def test_large_bodies_through_the_way_out(sandbox: BubblewrapSandbox) -> None:
    sizes: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        sizes.append(len(data))
        writer.write(data)
        writer.write_eof()
        await writer.drain()
        writer.close()

    servers: list[asyncio.Server] = []

    async def serve(listener: Any) -> None:
        servers.append(await asyncio.start_server(answer, sock=listener))

    script = """
import socket
s = socket.create_connection(("127.0.0.1", 3128))
s.sendall(bytes(3_000_000)); s.shutdown(socket.SHUT_WR)
n = 0
while data := s.recv(65536): n += len(data)
print(n)
"""
    process = await carry(sandbox, "python3", "-c", script, on_listener=serve)
    assert await ended(process) == (b"3000000\n", 0, "exited", "")
    assert sizes == [3_000_000]
    servers[0].close()
    await servers[0].wait_closed()
    assert list(sandbox.scratch.iterdir()) == []


async def test_a_way_out_whose_server_is_gone_is_closed(sandbox: BubblewrapSandbox) -> None:
    async def serve(listener: Any) -> None:
        listener.close()

    process = await carry(sandbox, "python3", "-c", FETCH, on_listener=serve)
    output, code, _, tail = await ended(process)
    assert (output, code) == (b"", 1)
    assert "Remote end closed connection" in tail or "reset by peer" in tail


async def test_what_is_left_running_ends_with_the_command(sandbox: BubblewrapSandbox) -> None:
    script = "setsid sh -c 'trap \"\" TERM HUP; echo $$; sleep 600' & sleep 0.5; exit 3"
    process = await carry(sandbox, "sh", "-c", script)
    output, code, _, _ = await ended(process)
    assert code == 3
    assert output.strip().isdigit()


async def test_limits(sandbox: BubblewrapSandbox) -> None:
    flood = await carry(sandbox, "yes", max_output=1_000_000)
    assert (await ended(flood))[2] == "output"
    slow = await carry(sandbox, "sleep", "600", seconds=0.5)
    assert (await ended(slow))[2] == "timeout"
    process = await carry(
        sandbox, "sh", "-c", "trap 'echo bye; exit 5' TERM; echo on; while :; do sleep 0.05; done"
    )
    assert await process.stdout.readline() == b"on\n"
    await process.terminate(60)
    assert (await process.wait()).code == 5


async def test_a_sandbox_without_python_says_so(sandbox: BubblewrapSandbox) -> None:
    wire = PipeWire(await sandbox.exec(["no-such-python"], stdin=True))
    with pytest.raises(SandboxError, match=r"does not start.*no-such-python"):
        await carried.start(
            wire,
            Order(["true"], ENV, "/"),
            stdin=False,
            on_listener=None,
            scratch=sandbox.scratch,
            max_output=None,
        )


async def test_a_start_that_is_given_up_at_once_leaves_no_carrier(
    sandbox: BubblewrapSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled(*, stdin: bool) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(carried, "connect", cancelled)
    process = await sandbox.exec(carried.COMMAND, stdin=True)
    with pytest.raises(asyncio.CancelledError):
        await carried.start(
            PipeWire(process),
            Order(["true"], ENV, "/"),
            stdin=False,
            on_listener=None,
            scratch=sandbox.scratch,
            max_output=None,
        )
    async with asyncio.timeout(60):
        assert (await process.wait()).reason == "killed"


def frame(kind: int, number: int, data: bytes = b"") -> bytes:
    return HEADER.pack(kind, number, len(data)) + data


END = frame(EXIT, 0, b'{"code": 0, "timeout": false}')
HOSTILE = {
    "huge frame": (HEADER.pack(DATA, STDIO, MAX_FRAME + 1), "too large"),
    "more than the window": (frame(DATA, STDIO, bytes(WINDOW + 1)), "more data than was allowed"),
    "one channel twice": (frame(OPEN, 7) * 2, "no more channels"),
    "an end that is none": (frame(EXIT, 0, b"[]"), "an end that is none"),
    "an end without an end": (frame(EXIT, 0, b"[" * 100), "Expecting value"),
    "an end with a long story": (frame(EXIT, 0, b'{"code": "a", "timeout": true}'), "cannot be"),
    "an end with a very long story": (frame(EXIT, 0, b" " * 100_000), "a long one"),
    "a status that cannot be": (frame(EXIT, 0, b'{"code": 99999,"timeout":false}'), "cannot be"),
    "many ends": (END * 1000, "a second end"),
    "ready twice": (frame(READY, 0), "not for the server"),
    "a frame of another kind": (frame(77, 0), "not for the server"),
    "data of a channel that was never open": (frame(DATA, 7, b"x"), "not open"),
    "data without any": (frame(DATA, STDIO), "data without any"),
    "credit for nothing": (frame(CREDIT, STDIO, bytes(4)), "credit"),
    "credit for what was not sent": (frame(CREDIT, STDIO, bytes((0, 0, 0, 1))), "credit"),
    "credit in many bytes": (frame(CREDIT, STDIO, bytes(1000)), "credit"),
    "the end of a channel twice": (frame(EOF, STDIO) * 2, "second end"),
    "a channel closed twice": (frame(CLOSE, STDIO) * 2, "second end"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_frames_that_break_the_rules_end_the_command(sandbox: BubblewrapSandbox, name: str) -> None:
    frames, said = HOSTILE[name]
    script = f"""
import struct, sys, time
sys.stdout.buffer.write({HEADER.pack(READY, 0, 0)!r})
sys.stdout.flush()
sys.stdin.buffer.read({len(carried.SOURCE)})
for _ in "START", "GO":
    sys.stdin.buffer.read(struct.unpack("!BII", sys.stdin.buffer.read(9))[2])
sys.stdout.buffer.write(sys.stdin.buffer.read({len(frames)}))
sys.stdout.flush()
time.sleep(600)
"""
    served = Served()
    inner = await sandbox.exec(["python3", "-c", script], stdin=True)
    process = await carried.start(
        PipeWire(inner),
        Order(["true"], ENV, "/"),
        stdin=False,
        on_listener=served.serve,
        scratch=sandbox.scratch,
        max_output=None,
    )
    # Not among its arguments, where they would not find room.
    assert inner.stdin is not None
    inner.stdin.write(frames)
    async with asyncio.timeout(60):
        end = await process.wait()
    await process.kill()
    await served.close()
    assert end.reason == "killed"
    assert "broke the rules" in end.stderr_tail
    assert said in end.stderr_tail


async def test_frames_in_pieces() -> None:
    """However the bytes come, the frames are the same."""
    frames: list[tuple[int, int, bytes]] = []
    sent: list[bytes] = []

    async def write(data: bytes) -> None:
        sent.append(data)

    mux = Mux(write, lambda kind, number, data: frames.append((kind, number, data)))
    mux.forget(mux.open(4))
    channel = mux.open(5)
    stream = frame(OPEN, 9) + frame(DATA, 5, b"abc") + frame(DATA, 4, b"lost") + frame(DATA, 5, b"d")
    stream += frame(EOF, 5)
    for index in range(len(stream)):
        mux.feed(stream[index : index + 1])
    assert frames == [(OPEN, 9, b"")]
    assert await channel.receive() == b"abcd"
    assert await channel.receive() == b""
    assert sent == [frame(CREDIT, 5, struct.pack("!I", 4))]
    with pytest.raises(ValueError, match="no more channels"):
        mux.open(5)
    mux.lose()
    with pytest.raises(ConnectionError):
        await channel.send(b"x" * (WINDOW + 1))


async def test_what_comes_late_for_a_channel() -> None:
    """All that was under way when it was closed is dropped, also in the smallest frames, and not more."""

    async def write(data: bytes) -> None:
        pass

    mux = Mux(write, lambda kind, number, data: None)
    mux.forget(mux.open(1))
    credit = frame(CREDIT, 1, struct.pack("!I", 1))
    mux.feed(frame(DATA, 1, b"x") * WINDOW + credit * WINDOW + frame(EOF, 1) + frame(CLOSE, 1))
    with pytest.raises(ValueError, match="not open"):
        mux.feed(frame(DATA, 1, b"x") * (LATE // 10))
