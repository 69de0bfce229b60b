"""The way out: connections that are kept, framing, early ends on each side, TLS, and bounds on time and memory."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from taskyard.gateway import dial, upstream
from taskyard.gateway.answer_parser import MAX_HEAD, RemoteProtocolError
from taskyard.gateway.headers import Header
from taskyard.gateway.origins import Origin, parse_base_url
from taskyard.gateway.server import _tls
from taskyard.gateway.upstream import LocalProtocolError, Timeouts, Upstream, UpstreamRequest
from taskyard.gateway.wire import (
    ConnectError,
    ConnectTimeoutError,
    ReadTimeoutError,
    UpstreamError,
    WriteTimeoutError,
)
from tests.support.certificates import make_certificate
from tests.support.door import eventually

PATIENT = Timeouts(60, 60, 60)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = bytes(64 * 1024)


@dataclass
class Far:
    """The far end of one connection."""

    number: int
    """Which connection it is, from 1."""
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    server: Server

    async def head(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.server.heads.append(head)
        return head

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def read_nothing(self) -> None:
        cast(asyncio.Transport, self.writer.transport).pause_reading()

    async def until_the_end(self) -> bytes:
        """What else comes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


@dataclass
class Server:
    origin: Origin
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0
    ended: int = 0


Handler = Callable[[Far], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler, context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """A server that calls `handler` for each connection, and closes it then."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        server.connections += 1
        try:
            await handler(Far(server.connections, reader, writer, server))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            server.ended += 1
            tasks.discard(task)
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]
    server = Server(Origin("https" if context else "http", "127.0.0.1", port))
    try:
        async with asyncio.timeout(60):
            yield server
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def out() -> AsyncIterator[Upstream]:
    made = Upstream(ssl.create_default_context())
    yield made
    made.close()


def request(
    origin: Origin,
    method: str = "GET",
    body: AsyncIterator[bytes] | bytes | None = None,
    headers: Sequence[Header] = (),
    timeouts: Timeouts = PATIENT,
) -> UpstreamRequest:
    return UpstreamRequest(method, origin, b"/x", headers, body, timeouts)


async def ask(out: Upstream, asked: UpstreamRequest) -> bytes:
    """The whole body."""
    with closing(await out.send(asked)) as answer:
        return b"".join([piece async for piece in answer])


async def endless(made: list[int]) -> AsyncIterator[bytes]:
    """A body that never ends; `made[0]` counts its pieces."""
    while True:
        made[0] += 1
        yield PIECE


async def stands_still(count: Callable[[], int]) -> None:
    before = -1
    while before != count():
        before = count()
        await asyncio.sleep(0.3)


def replying(*answers: bytes) -> Handler:
    """Each request of a connection gets the next one; then it is closed."""

    async def handler(far: Far) -> None:
        for answer in answers:
            await far.head()
            await far.send(answer)

    return handler


# --- kept connections ---


async def test_a_connection_is_used_again(out: Upstream) -> None:
    answers = [OK, CHUNKED + b"2\r\nok\r\n0\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n", OK, OK]
    async with serving(replying(*answers)) as server:
        got = [await ask(out, request(server.origin)) for _ in answers]
        assert got == [b"ok", b"ok", b"", b"ok", b"ok"]
        assert server.connections == 1


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok",
        OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfake",
        OK + b"more",
        CHUNKED + b"2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n",
    ],
)
async def test_what_is_not_certain_is_not_used_again(out: Upstream, first: bytes) -> None:
    async def handler(far: Far) -> None:
        await far.head()
        await far.send(first if far.number == 1 else OK)
        await far.until_the_end()

    async with serving(handler) as server:
        assert [await ask(out, request(server.origin)) for _ in range(2)] == [b"ok", b"ok"]
        assert server.connections == 2


async def test_an_answer_that_was_not_read_to_its_end_ends_the_connection(out: Upstream) -> None:
    async with serving(replying(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", OK)) as server:
        with closing(await out.send(request(server.origin))):
            pass
        await eventually(lambda: server.ended == 1, "the connection is still there")


async def test_bytes_that_nobody_asked_for_are_no_answer(out: Upstream) -> None:
    """They come after the answer was read, while the connection is kept."""
    go_on, sent = asyncio.Event(), asyncio.Event()

    async def handler(far: Far) -> None:
        await far.head()
        await far.send(OK)
        if far.number == 1:
            await go_on.wait()
            await far.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfake")
            sent.set()
        await far.until_the_end()

    async with serving(handler) as server:
        assert await ask(out, request(server.origin)) == b"ok"
        go_on.set()
        await sent.wait()
        assert await ask(out, request(server.origin)) == b"ok"
        assert server.connections == 2


async def test_a_connection_that_the_server_has_closed(out: Upstream) -> None:
    async with serving(replying(OK)) as server:
        for number in (1, 2):
            assert await ask(out, request(server.origin, "POST", b"body")) == b"ok"
            await eventually(lambda number=number: server.ended == number, "not closed")  # type: ignore[misc]
        assert server.connections == 2


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize(
    ("method", "body", "answer", "repeated"),
    [
        ("GET", None, b"", True),
        ("GET", None, b"HTTP/1.1 2", False),
        ("POST", None, b"", False),
        ("POST", b"body", b"", False),
    ],
)
async def test_a_connection_that_ends_under_the_next_request(
    out: Upstream, how: str, method: str, body: bytes | None, answer: bytes, *, repeated: bool
) -> None:
    """Sent again is only what does no harm, and only when nothing has come back."""

    async def handler(far: Far) -> None:
        await far.head()
        await far.send(OK)
        if far.number == 1:
            await far.head()
            await far.send(answer)
            if how == "reset":
                linger = b"\1\0\0\0\0\0\0\0"
                far.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                far.writer.transport.abort()
        else:
            await far.until_the_end()

    async with serving(handler) as server:
        assert await ask(out, request(server.origin)) == b"ok"
        if repeated:
            assert await ask(out, request(server.origin, method, body)) == b"ok"
        else:
            with pytest.raises(UpstreamError):
                await ask(out, request(server.origin, method, body))
        assert len(server.heads) == 2 + repeated


async def test_kept_connections_are_few(out: Upstream) -> None:
    count = upstream.MAX_IDLE + 4
    together = asyncio.Barrier(count)

    async def handler(far: Far) -> None:
        while True:
            await far.head()
            await together.wait()
            await far.send(OK)

    async with serving(handler) as server:
        await asyncio.gather(*(ask(out, request(server.origin)) for _ in range(count)))
        await eventually(lambda: server.ended == 4, "all of them are kept")
        out.close()
        await eventually(lambda: server.ended == count, "kept after the end")


async def test_kept_connections_are_not_old(out: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "IDLE_S", -1.0)
    async with serving(replying(OK, OK)) as server:
        assert [await ask(out, request(server.origin)) for _ in range(2)] == [b"ok", b"ok"]
        assert server.connections == 2


async def test_connections_are_kept_for_their_origin_only(out: Upstream) -> None:
    async with serving(replying(OK, OK)) as one, serving(replying(OK, OK)) as other:
        for server in (one, other, one, other):
            assert await ask(out, request(server.origin)) == b"ok"
        assert (one.connections, other.connections, len(one.heads), len(other.heads)) == (1, 1, 2, 2)


# --- requests ---


async def test_what_is_sent(out: Upstream) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"ab", b"", b"c"):
            yield piece

    bodies = []

    async def handler(far: Far) -> None:
        for end in (b"\r\n\r\n", b"abc", b"0\r\n\r\n", b"abc", b"\r\n\r\n"):
            bodies.append(await far.reader.readuntil(end))
            await far.send(OK)

    async with serving(handler) as server:
        for asked in (
            request(server.origin, headers=[(b"host", b"other.test"), (b"a", b"b")]),
            request(server.origin, "POST", b"abc", [(b"content-length", b"7")]),
            request(server.origin, "POST", pieces()),
            request(server.origin, "PUT", pieces(), [(b"content-length", b"3")]),
            request(server.origin, "POST"),
        ):
            assert await ask(out, asked) == b"ok"
        host = b"host: " + server.origin.authority
    assert bodies == [
        b"GET /x HTTP/1.1\r\nhost: other.test\r\na: b\r\n\r\n",
        b"POST /x HTTP/1.1\r\n%b\r\ncontent-length: 3\r\n\r\nabc" % host,
        b"POST /x HTTP/1.1\r\n%b\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n" % host,
        b"PUT /x HTTP/1.1\r\n%b\r\ncontent-length: 3\r\n\r\nabc" % host,
        b"POST /x HTTP/1.1\r\n%b\r\ncontent-length: 0\r\n\r\n" % host,
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"a", b"secret\r\nb: c"),
        (b"a", b"secret\nb: c"),
        (b"a", b"secret\r"),
        (b"a", b"secret\0"),
        (b"a\r\nb", b"secret"),
        (b"a: b\r\nc", b"secret"),
        (b"a b", b"secret"),
        (b"", b"secret"),
        (b"\xff", b"secret"),
    ],
)
async def test_no_header_becomes_two(out: Upstream, name: bytes, value: bytes) -> None:
    async with serving(replying(OK)) as server:
        with pytest.raises(LocalProtocolError) as caught:
            await out.send(request(server.origin, headers=[(name, value)]))
        assert not server.heads
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("target", [b"/a b", b"/a\r\nb: c", b"", b"/a\0", b"/\xff"])
def test_a_target_stays_in_its_line(target: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        UpstreamRequest("GET", Origin("http", "x", 80), target, [], None, PATIENT).head()


@pytest.mark.parametrize("length", [2, 4])
async def test_a_body_of_another_length(out: Upstream, length: int) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"c"

    ends = []

    async def handler(far: Far) -> None:
        await far.head()
        ends.append(await far.until_the_end())

    async with serving(handler) as server:
        with pytest.raises(LocalProtocolError):
            await out.send(request(server.origin, "POST", body(), [(b"content-length", b"%d" % length)]))
        await eventually(lambda: server.ended == server.connections, "the connection is still there")
    assert all(len(end) < 4 for end in ends)


async def test_the_head_goes_before_the_body_is_there(out: Upstream) -> None:
    arrived = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        await arrived.wait()
        yield b"ab"

    async def handler(far: Far) -> None:
        await far.head()
        arrived.set()
        await far.reader.readuntil(b"0\r\n\r\n")
        await far.send(OK)

    async with serving(handler) as server:
        assert await ask(out, request(server.origin, "POST", body())) == b"ok"


# --- answers ---


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (CHUNKED + b"2\r\nab\r\n0001;x=y\r\nc\r\n0\r\nX-Sum: 7\r\nX: y\r\n\r\n", b"abc"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not\r\nContent-Length: 9\r\n\r\n", b""),
        (b"HTTP/1.1 100 Go on\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nno", b"no"),
    ],
)
@pytest.mark.parametrize("split", [False, True], ids=["at once", "byte by byte"])
async def test_framing(out: Upstream, answer: bytes, body: bytes, *, split: bool) -> None:
    async def handler(far: Far) -> None:
        await far.head()
        for piece in [bytes([byte]) for byte in answer] if split else [answer]:
            await far.send(piece)

    async with serving(handler) as server:
        with closing(await out.send(request(server.origin))) as got:
            assert b"".join([piece async for piece in got]) == body
            assert not {b"link", b"x-sum"} & {name for name, _ in got.headers}


async def test_an_answer_to_head_ends_with_its_head(out: Upstream) -> None:
    async with serving(replying(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")) as server:
        with closing(await out.send(request(server.origin, "HEAD"))) as answer:
            assert [piece async for piece in answer] == []
            assert answer.header(b"content-length") == "5"


async def test_pieces_come_when_they_are_there(out: Upstream) -> None:
    go_on = asyncio.Event()

    async def handler(far: Far) -> None:
        await far.head()
        await far.send(CHUNKED)
        for piece in (b"a", b"bc"):
            await go_on.wait()
            go_on.clear()
            await far.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await go_on.wait()
        await far.send(b"0\r\n\r\n")

    got = []
    async with serving(handler) as server:
        with closing(await out.send(request(server.origin))) as answer:
            go_on.set()
            async for piece in answer:
                got.append(piece)
                go_on.set()
    assert got == [b"a", b"bc"]


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: identity\r\n\r\nok",
        HEAD + b"Content-Length: -2\r\n\r\nok",
        HEAD + b"Content-Length: +2\r\n\r\nok",
        HEAD + b"Content-Length: 0x2\r\n\r\nok",
        HEAD + b"Content-Length: 2, 2\r\n\r\nok",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nok",
        HEAD + b"Content-Length : 2\r\n\r\nok",
        HEAD + b"A: b\r\n c\r\nContent-Length: 2\r\n\r\nok",
        HEAD + b"A: b\0\r\nContent-Length: 2\r\n\r\nok",
        HEAD + b"A: b\rContent-Length: 2\r\n\r\nok",
        HEAD + b"no field\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/0.9 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nok",
        b"HTTP/1.1 101 Switch\r\n\r\n" + OK,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 2",
        HEAD + b"Content-Length: 000000000000000000002\r\n\r\nok",
        CHUNKED + b"2\r\nokXX0\r\n\r\n",
        CHUNKED + b"2\nok\r\n0\r\n\r\n",
        CHUNKED + b"-2\r\nok\r\n0\r\n\r\n",
        CHUNKED + b" 2\r\nok\r\n0\r\n\r\n",
        CHUNKED + b"fffffffffffffffff\r\nok",
        CHUNKED + b"2\r\nok\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\nno field\r\n\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\nX: y\r\nContent-Length: 2\r\n\r\n",
        HEAD + b"Content-Length: 3\r\n\r\nok",
    ],
)
async def test_bad_framing(out: Upstream, answer: bytes) -> None:
    async def handler(far: Far) -> None:
        await far.head()
        await far.send(answer)
        far.writer.write_eof()
        await far.until_the_end()

    async with serving(handler) as server:
        with pytest.raises(RemoteProtocolError) as caught:
            await ask(out, request(server.origin))
        assert "Error" not in str(caught.value), "the parser's reason is lost"
        await eventually(lambda: server.ended == 1, "the connection is still there")


async def test_what_came_before_bad_framing_counts(out: Upstream) -> None:
    got = []
    async with serving(replying(CHUNKED + b"2\r\nok\r\nXX")) as server:
        with closing(await out.send(request(server.origin))) as answer:
            pieces = aiter(answer)
            got.append(await anext(pieces))
            with pytest.raises(RemoteProtocolError):
                await anext(pieces)
    assert got == [b"ok"]


FIELD = b"A: " + b"b" * 1000 + b"\r\n"


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (HEAD, FIELD),
        (HEAD + b"A: ", PIECE.replace(b"\0", b"b")),
        (b"HTTP/1.1 200 ", b"O" * 1000),
        (b"", b"HTTP/1.1 100 Go on\r\n\r\n" * 10),
        (CHUNKED + b"2\r\nok\r\n0\r\n", FIELD),
        (CHUNKED + b"2;", b"x" * 1000),
    ],
    ids=["fields", "value", "reason", "heads before it", "trailers", "extension of a chunk"],
)
async def test_heads_without_end(out: Upstream, begin: bytes, more: bytes) -> None:
    async def handler(far: Far) -> None:
        await far.head()
        await far.send(begin)
        while True:
            await far.send(more)

    async with serving(handler) as server:
        with pytest.raises(RemoteProtocolError, match="exceed"):
            await ask(out, request(server.origin))


async def test_a_whole_head_has_the_same_limit(out: Upstream) -> None:
    head = HEAD + FIELD * (MAX_HEAD // len(FIELD) + 1) + b"Content-Length: 2\r\n\r\nok"
    async with serving(replying(head)) as server:
        with pytest.raises(RemoteProtocolError, match="exceed"):
            await ask(out, request(server.origin))


# --- early ends ---


async def test_an_early_error_ends_the_request(out: Upstream) -> None:
    """The server reads nothing of the body and waits."""

    async def handler(far: Far) -> None:
        await far.head()
        far.read_nothing()
        await far.send(b"HTTP/1.1 413 Too large\r\nContent-Length: 2\r\n\r\nno")
        await asyncio.Event().wait()

    made = [0]
    async with serving(handler) as server:
        with closing(await out.send(request(server.origin, "POST", endless(made)))) as answer:
            assert answer.status == 413
            assert [piece async for piece in answer] == [b"no"]
        assert await ask_again(out, server) == 2  # the old one is in the middle of a request


async def ask_again(out: Upstream, server: Server) -> int:
    with closing(await out.send(request(server.origin))):
        return server.connections


async def test_an_early_head_does_not_end_the_request(out: Upstream) -> None:
    """Git's own server says 200 before it has read a push."""
    size = 200

    async def body() -> AsyncIterator[bytes]:
        for _ in range(size):
            yield PIECE

    async def handler(far: Far) -> None:
        await far.head()
        await far.send(HEAD + b"Content-Length: 8\r\n\r\n")
        got = 0
        while got < size * len(PIECE):
            got += len(await far.reader.read(1 << 20))
        await far.send(b"%08d" % size)

    length = (b"content-length", b"%d" % (size * len(PIECE)))
    async with serving(handler) as server:
        assert await ask(out, request(server.origin, "POST", body(), [length])) == b"%08d" % size


@pytest.mark.parametrize("half", [True, False], ids=["half closed", "closed"])
async def test_a_server_that_leaves_in_the_middle_of_the_request(out: Upstream, *, half: bool) -> None:
    async def handler(far: Far) -> None:
        await far.head()
        if half:
            far.writer.write_eof()
            await far.until_the_end()

    async with serving(handler) as server:
        with pytest.raises(UpstreamError):
            await out.send(request(server.origin, "POST", endless([0])))


async def test_a_half_closed_answer_counts(out: Upstream) -> None:
    async def handler(far: Far) -> None:
        await far.head()
        await far.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        far.writer.write_eof()
        await far.until_the_end()

    async with serving(handler) as server:
        assert await ask(out, request(server.origin)) == b"all of it"
        await eventually(lambda: server.ended == 1, "the connection is still there")


@pytest.mark.parametrize("when", ["head", "body", "request"])
async def test_cancelled(out: Upstream, when: str) -> None:
    arrived = asyncio.Event()

    async def handler(far: Far) -> None:
        await far.head()
        if when == "body":
            await far.send(HEAD + b"Content-Length: 9\r\n\r\nok")
        arrived.set()
        await far.until_the_end()

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.Event().wait()

    async with serving(handler) as server:
        asked = request(server.origin, "POST", body() if when == "request" else b"x")
        task = asyncio.create_task(ask(out, asked))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: server.ended == 1, "the connection is still there")


# --- time and memory ---


async def test_a_slow_reader_slows_the_server(out: Upstream) -> None:
    sent, total = 0, 64 * 1024 * 1024

    async def handler(far: Far) -> None:
        nonlocal sent
        await far.head()
        await far.send(HEAD + b"Content-Length: %d\r\n\r\n" % total)
        while sent < total:
            await far.send(PIECE)
            sent += len(PIECE)

    async with serving(handler) as server:
        with closing(await out.send(request(server.origin))) as answer:
            await eventually(lambda: sent > 0, "nothing was sent")
            await stands_still(lambda: sent)
            assert sent < total / 2, "it swallows what nobody reads"
            assert sum([len(piece) async for piece in answer]) == total


async def test_a_slow_server_slows_the_request(out: Upstream) -> None:
    async def handler(far: Far) -> None:
        await far.head()
        far.read_nothing()
        await asyncio.Event().wait()

    made = [0]
    async with serving(handler) as server:
        task = asyncio.create_task(out.send(request(server.origin, "POST", endless(made))))
        await eventually(lambda: made[0] > 0, "nothing was sent")
        await stands_still(lambda: made[0])
        assert made[0] * len(PIECE) < 32 * 1024 * 1024, "it swallows what nobody takes"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_an_early_answer_that_nobody_reads_is_bounded(out: Upstream) -> None:
    """A server that answers without end, and does not read, while the request is sent."""
    sent = 0

    async def handler(far: Far) -> None:
        nonlocal sent
        await far.head()
        far.read_nothing()
        await far.send(HEAD + b"\r\n")
        while True:
            await far.send(PIECE)
            sent += 1

    async with serving(handler) as server:
        task = asyncio.create_task(out.send(request(server.origin, "POST", endless([0]))))
        await eventually(lambda: sent > 0, "nothing was sent")
        await stands_still(lambda: sent)
        assert sent * len(PIECE) < 32 * 1024 * 1024
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_silence_has_an_end(out: Upstream) -> None:
    async def handler(far: Far) -> None:
        await far.head()
        far.read_nothing()
        await asyncio.Event().wait()

    async with serving(handler) as server:
        with pytest.raises(ReadTimeoutError):
            await out.send(request(server.origin, timeouts=Timeouts(60, 0.05, 60)))
        with pytest.raises(WriteTimeoutError):
            await out.send(request(server.origin, "POST", endless([0]), timeouts=Timeouts(60, 60, 0.05)))


# --- connecting ---


async def test_nobody_listens(out: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectError):
        await out.send(request(Origin("http", "127.0.0.1", port)))


async def test_an_address_that_leads_nowhere_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address says nothing, the second refuses, the third is there."""
    tried: list[object] = []
    connect = dial._connect

    async def some(entry: dial.Found) -> socket.socket:
        tried.append(entry[4])
        if entry[4] == "silent":
            await asyncio.Event().wait()
        if entry[4] == "refuses":
            raise ConnectionRefusedError
        return await connect(entry)

    monkeypatch.setattr(dial, "_connect", some)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", listening.getsockname())
        found = [(socket.AF_INET, 0, 0, "", "silent"), (socket.AF_INET, 0, 0, "", "refuses"), there]
        async with asyncio.timeout(60):
            with closing(await dial._first(found)) as connected:
                assert connected.getpeername() == listening.getsockname()
        assert len(tried) == 3
        with pytest.raises(ConnectionRefusedError):
            await dial._first(found[1:2])


def test_families_take_turns() -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    found = [(six, 1), (six, 2), (six, 3), (four, 4), (four, 5)]
    assert [entry[1] for entry in dial.in_turn(found)] == [1, 4, 2, 5, 3]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls") / "server.pem", ["localhost"])


@pytest.mark.parametrize(
    ("host", "trusted", "reason"),
    [
        ("localhost", True, None),
        ("127.0.0.1", True, "certificate verify failed"),
        ("localhost", False, "certificate verify failed"),
    ],
    ids=["right name", "wrong name", "unknown issuer"],
)
async def test_tls(certificate: Path, host: str, reason: str | None, *, trusted: bool) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    out = Upstream(ssl.create_default_context(cafile=str(certificate) if trusted else None))
    async with serving(replying(OK, OK), context) as server:
        asked = request(Origin("https", host, server.origin.port), "POST", b"", [(b"x-api-key", b"key")])
        if reason is None:
            for _ in range(2):
                assert await ask(out, asked) == b"ok"
            assert server.connections == 1
        else:
            with pytest.raises(ConnectError, match=reason):
                await out.send(asked)
            assert not server.heads
        out.close()


async def test_tls_that_does_not_come(out: Upstream) -> None:
    async def handler(far: Far) -> None:
        await far.until_the_end()

    async with serving(handler) as server:
        origin = Origin("https", "localhost", server.origin.port)
        with pytest.raises(ConnectTimeoutError):
            await out.send(request(origin, timeouts=Timeouts(0.2, 60, 60)))
        await eventually(lambda: server.ended == server.connections, "the connection is still there")


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR", None])
def test_trusted_certificates(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, str(certificate if variable.endswith("FILE") else certificate.parent))
    context = _tls.__wrapped__()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    counts = {"SSL_CERT_FILE": 1, "SSL_CERT_DIR": 0}  # those of a folder are loaded when they are needed
    found = context.cert_store_stats()["x509"]
    assert found == counts[variable] if variable else found > 50


# --- addresses of upstreams ---


@pytest.mark.parametrize(
    ("text", "authority", "port", "path"),
    [
        ("https://api.example", b"api.example", 443, b""),
        ("HTTPS://API.Example:443/", b"api.example", 443, b""),
        ("http://api.example:443/v", b"api.example:443", 443, b"/v"),
        ("http://my_proxy:4000/a b/\xe9%20/", b"my_proxy:4000", 4000, b"/a%20b/%C3%A9%20"),
        ("http://[::1]:8080/x", b"[::1]:8080", 8080, b"/x"),
        ("https://b\xfccher.example/", b"xn--bcher-kva.example", 443, b""),
    ],
)
def test_base_urls(text: str, authority: bytes, port: int, path: bytes) -> None:
    url = parse_base_url(text)
    assert (url.origin.authority, url.origin.port, url.path) == (authority, port, path)


@pytest.mark.parametrize(
    "text",
    [
        "", "api.example", "ftp://api.example", "https://", "https:///v1", "https://me:pw@api.example",
        "https://api.example?a=b", "https://api.example/#x", "https://api.example:0", "https://api.example:99999",
        "https://api.example:x", "https://api example", "https://api.example\\@other.example",
        "https://api.example/a\r\nb", "https://[::1", "https://a..b",
    ],
)  # fmt: skip
def test_what_is_no_base_url(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - its kinds are many
        parse_base_url(text)
