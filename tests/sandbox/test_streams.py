"""The reader of a sandbox's output: bounded read-ahead, long lines."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest
import uvloop

from taskyard.sandbox.streams import READ_AHEAD, LineReader, Tail, connect


def fed(*chunks: bytes, line_bytes: int = 10 * READ_AHEAD, end: bool = True) -> LineReader:
    reader = LineReader(line_bytes)
    for chunk in chunks:
        reader.feed_data(chunk)
    if end:
        reader.feed_eof()
    return reader


async def test_lines_longer_than_the_read_ahead() -> None:
    long = b"x" * (3 * READ_AHEAD)
    reader = fed(b"a\n", long, b"\nb\n", b"rest")
    assert [await reader.readline() for _ in range(4)] == [b"a\n", long + b"\n", b"b\n", b"rest"]
    assert reader.at_eof()
    assert await reader.readline() == b""


async def test_a_line_that_is_too_long() -> None:
    reader = fed(b"x" * (12 * READ_AHEAD) + b"\nnext\n")
    with pytest.raises(ValueError, match="longer than limit"):
        await reader.readline()
    left = await reader.read()
    assert left in {b"", b"next\n"}


async def test_a_read_that_was_cancelled_loses_nothing() -> None:
    reader = fed(b"x" * (2 * READ_AHEAD), end=False)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await reader.readline()
    assert not reader.at_eof()
    reader.feed_data(b"y\nz")
    reader.feed_eof()
    assert await reader.read(10) == b"x" * 10
    assert await reader.readexactly(2 * READ_AHEAD - 7) == b"x" * (2 * READ_AHEAD - 10) + b"y\nz"


async def test_reads_after_a_cancelled_line() -> None:
    for method in ("read", "readexactly", "readline", "readuntil"):
        reader = fed(b"x" * (2 * READ_AHEAD), end=False)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await reader.readline()
        reader.feed_data(b"y\n")
        reader.feed_eof()
        whole = b"x" * (2 * READ_AHEAD) + b"y\n"
        if method == "readexactly":
            with pytest.raises(asyncio.IncompleteReadError) as info:
                await reader.readexactly(len(whole) + 1)
            assert info.value.partial == whole
        else:
            assert await getattr(reader, method)() == whole


async def test_tail_keeps_the_end() -> None:
    tail = Tail(4)
    await tail.drain(fed(b"abc", b"defg", b"\xff"))
    assert tail.text() == "efg\ufffd"


async def test_pipes() -> None:
    streams, (out, error, into) = await connect(stdin=True)
    assert streams.stdin is not None
    os.write(out, b"o")
    os.write(error, b"e")
    streams.stdin.write(b"i")
    await streams.stdin.drain()
    assert os.read(into, 10) == b"i"
    for fd in (out, error, into):
        os.close(fd)
    async with asyncio.timeout(60):
        assert (await streams.stdout.read(), await streams.stderr.read()) == (b"o", b"e")
    streams.close()
    assert streams.closed
    await asyncio.sleep(0)


def test_closing_a_stream_closes_nothing_else() -> None:
    """The server runs on uvloop, which closes a descriptor and then the object that it was given for it."""
    over = threading.Event()
    lost: list[OSError] = []

    def open_and_close() -> None:
        while not over.is_set():
            try:
                os.close(os.open("/dev/null", os.O_RDONLY))
            except OSError as error:
                lost.append(error)

    async def work() -> None:
        for _ in range(200):
            streams, others = await connect(stdin=True)
            for other in others:
                os.close(other)
            streams.close()
            await asyncio.sleep(0)

    threads = [threading.Thread(target=open_and_close) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work())
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert lost == []
