"""Requests that pass: bytes unchanged, at once, with an end on one side ending the other."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import statistics
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from structlog.testing import capture_logs

from taskyard.gateway.connection import MAX_HEAD, Connection
from tests.support.door import KEY, Door, Exchange, eventually, open_door, open_upstream

MESSAGES = "/anthropic/v1/messages"


def post(target: str, body: bytes = b"", headers: str = "") -> bytes:
    return (
        f"POST {target} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )


async def at_eof(exchange: Exchange) -> None:
    """The gateway has hung up on the upstream."""
    try:
        async with asyncio.timeout(60):
            assert await exchange.reader.read() == b""
    except ConnectionError:
        pass


async def test_the_real_key_and_nothing_from_inside() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b'{"ok":1}', headers="Set-Cookie: a=b\r\nrequest-id: 7\r\n")

    async with open_upstream(handler) as (url, seen), open_door(url + "/corp") as door:
        sent = post(
            f"{MESSAGES}?beta=true",
            b"{}",
            "x-api-key: inside\r\nAuthorization: Bearer inside\r\nCookie: inside\r\nConnection: close\r\n",
        )
        got = await door.send(sent)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b'{"ok":1}'
    assert b"request-id: 7" in head
    assert b"cookie" not in head.lower()
    [request] = seen
    assert (request.method, request.target) == ("POST", "/corp/v1/messages?beta=true")
    assert request.body == b"{}"
    assert request.headers["x-api-key"] == [KEY]
    assert request.headers["host"] == [url.removeprefix("http://")]
    assert "inside" not in str(request.headers)
    assert not door.refusals


async def test_a_stream_is_not_held_up() -> None:
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        await go_on.wait()
        for piece in (b"a", b"bc", b"def"):
            go_on.clear()
            await exchange.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            await go_on.wait()
        await exchange.send(b"0\r\n\r\n")

    pieces = []
    async with (
        open_upstream(handler) as (url, _),
        open_door(url) as door,
        asyncio.timeout(60),
        httpx.AsyncClient(base_url=door.url) as client,
        client.stream("POST", MESSAGES) as answer,
    ):
        # the head is here although the upstream waits with the first byte
        assert answer.headers["content-type"] == "text/event-stream"
        go_on.set()
        async for piece in answer.aiter_raw():
            pieces.append(piece)
            go_on.set()  # the next piece is made only after this one has arrived
    assert pieces == [b"a", b"bc", b"def"]


async def test_a_request_is_not_held_up_either() -> None:
    arrived = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.read_until(b"first")
        arrived.set()
        await exchange.read_until(b"last")
        await exchange.answer(b"done", headers="Connection: close\r\n")

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await arrived.wait()
        yield b"last"

    async with (
        open_upstream(handler, read_body=False) as (url, _),
        open_door(url) as door,
        asyncio.timeout(60),
        httpx.AsyncClient(base_url=door.url) as client,
    ):
        assert (await client.post(MESSAGES, content=body())).text == "done"


async def test_big_bodies_both_ways() -> None:
    size = 20 * 1024 * 1024
    up, down = b"u" * size, b"d" * size

    async def handler(exchange: Exchange) -> None:
        digest = hashlib.sha256(exchange.body).hexdigest()
        await exchange.answer(down, headers=f"X-Digest: {digest}\r\n")

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 1 << 20):
            yield up[start : start + (1 << 20)]

    async with open_upstream(handler) as (url, seen), open_door(url) as door:
        for content in (up, chunks()):
            answer = await door.post(MESSAGES, content)
            assert answer.content == down
            assert answer.headers["x-digest"] == hashlib.sha256(up).hexdigest()
    assert seen[0].headers["content-length"] == [str(size)]
    assert seen[1].headers["transfer-encoding"] == ["chunked"]


async def test_a_slow_reader_slows_the_upstream() -> None:
    sent = 0
    total = 64 * 1024 * 1024

    async def handler(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.send(f"HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n\r\n".encode())
        while sent < total:
            await exchange.send(bytes(1 << 16))
            sent += 1 << 16

    async with open_upstream(handler) as (url, _), open_door(url) as door:
        reader, writer = await door.connect()
        writer.write(post(MESSAGES))
        await eventually(lambda: sent > 0, "nothing was sent")
        before = -1
        while before != sent:  # until it stands still
            before = sent
            await asyncio.sleep(0.3)
        assert sent < total / 2, "the gateway swallows what nobody reads"
        async with asyncio.timeout(60):
            got = len((await reader.readuntil(b"\r\n\r\n")) and b"")
            while got < total:
                got += len(await reader.read(1 << 20))
        writer.close()
        await writer.wait_closed()
    assert door.calls[0].complete


async def test_keep_alive_and_pipelining() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(exchange.target.encode() + exchange.body)

    async with open_upstream(handler) as (url, seen), open_door(url) as door:
        sent = b"".join(post(f"{MESSAGES}?n={i}", b"x" * i) for i in range(20))
        got = await door.send(sent + post(f"{MESSAGES}?n=20", b"", "Connection: close\r\n"))
        answers = got.split(b"HTTP/1.1 200 \r\n")[1:]
        assert [a.partition(b"\r\n\r\n")[2] for a in answers] == [
            b"/v1/messages?n=%d" % i + b"x" * i for i in range(20)
        ] + [b"/v1/messages?n=20"]
        # one upstream connection served them all
        assert len({e.writer.get_extra_info("peername") for e in seen}) == 1


async def test_requests_ahead_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answered request makes room for one more piece, and what is there already counts."""
    made: list[Connection] = []
    begin = Connection.run

    async def run(self: Connection) -> None:
        made.append(self)
        await begin(self)

    monkeypatch.setattr(Connection, "run", run)

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"{}")

    async with open_upstream(handler) as (url, seen), open_door(url) as door:
        reader, writer = await door.connect()
        many = b"GET /anthropic/api/hello HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000
        writer.write(many)
        most = 0
        async with asyncio.timeout(60):
            while len(seen) < 200:
                assert await reader.read(65536)
                most = max(most, len(made[0]._http.trailing_data[0]))
        writer.transport.abort()
    assert 0 < most <= 2 * MAX_HEAD


@pytest.mark.parametrize("way", ["up", "down"])
async def test_pieces_of_one_byte_do_not_hold_up_others(way: str) -> None:
    pieces = b"1\r\nx\r\n" * 30_000 + b"0\r\n\r\n"
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        while True:
            before = time.process_time()
            await asyncio.sleep(0)
            longest = max(longest, time.process_time() - before)

    async def handler(exchange: Exchange) -> None:
        if way == "down":
            await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces)
        else:
            await exchange.read_until(b"0\r\n\r\n")
            await exchange.answer(b"{}")

    async with open_upstream(handler, read_body=way == "down") as (url, _), open_door(url) as door:
        beating = asyncio.create_task(beat())
        body = pieces if way == "up" else b"2\r\n{}\r\n0\r\n\r\n"
        head = (
            f"POST {MESSAGES} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        assert (await door.send(head.encode() + body)).startswith(b"HTTP/1.1 200")
        beating.cancel()
    assert longest < 0.1, "others had to wait"


async def test_head_no_content_and_100_continue() -> None:
    async def handler(exchange: Exchange) -> None:
        if exchange.method == "HEAD":
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        elif "count" in exchange.target:
            await exchange.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            await exchange.answer(exchange.body)

    async with open_upstream(handler) as (url, seen), open_door(url) as door, asyncio.timeout(60):
        reader, writer = await door.connect()
        writer.write(b"HEAD /anthropic/api/hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"content-length: 5" in await reader.readuntil(b"\r\n\r\n")
        writer.write(post(f"{MESSAGES}/count_tokens"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(post(MESSAGES, b"body", "Expect: 100-continue\r\n")[:-4])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(b"body")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(4) == b"body"
        writer.close()
        await writer.wait_closed()
    assert "expect" not in seen[-1].headers


async def test_an_encoded_answer_is_passed_on_as_it_is() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"\x1f\x8bnot really gzip", headers="Content-Encoding: gzip\r\n")

    async with open_upstream(handler) as (url, seen), open_door(url) as door:
        got = await door.send(post(MESSAGES, b"", "Accept-Encoding: gzip\r\nConnection: close\r\n"))
    assert got.endswith(b"\r\n\r\n\x1f\x8bnot really gzip")
    assert b"content-encoding: gzip" in got
    assert seen[0].headers["accept-encoding"] == ["identity"]
    assert not door.calls[0].metered


@pytest.mark.parametrize("when", ["before the answer", "in the answer"])
async def test_a_client_that_leaves_ends_the_upstream_call(when: str) -> None:
    ended = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        if when == "in the answer":
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: x\n\n")
        await at_eof(exchange)
        ended.set()

    async with open_upstream(handler) as (url, seen), open_door(url) as door, asyncio.timeout(60):
        reader, writer = await door.connect()
        writer.write(post(MESSAGES, b"{}"))
        await eventually(lambda: bool(seen), "no request at the upstream")
        if when == "in the answer":
            await reader.readuntil(b"data: x")
        writer.close()
        await writer.wait_closed()
        await ended.wait()
        await eventually(lambda: bool(door.calls), "the call was not reported")
    [call] = door.calls
    assert not call.complete
    assert call.status == (499 if when == "before the answer" else 200)


async def test_a_client_that_leaves_in_its_body_ends_the_upstream_call() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.read_until(b"part")
        await at_eof(exchange)
        exchange.body += b" and end"

    async with open_upstream(handler, read_body=False) as (url, seen), open_door(url) as door:
        _, writer = await door.connect()
        writer.write(post(MESSAGES, b"part" + bytes(100))[:-100])
        await eventually(lambda: bool(seen) and seen[0].body == b"part", "the body did not arrive")
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: seen[0].body == b"part and end", "the upstream call was not ended")
        await eventually(lambda: bool(door.calls), "the call was not reported")
    assert (door.calls[0].status, door.calls[0].complete, door.refusals) == (499, False, [])


async def test_an_upstream_that_breaks_off_breaks_the_answer_off() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        exchange.writer.close()

    async with open_upstream(handler) as (url, _), open_door(url) as door:
        with capture_logs() as logs:
            async with (
                httpx.AsyncClient(base_url=door.url) as client,
                client.stream("POST", MESSAGES) as answer,
            ):
                with pytest.raises(httpx.TransportError):
                    await answer.aread()
    assert not door.calls[0].complete
    assert logs[0]["event"] == "gateway_upstream_failed"


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
@pytest.mark.parametrize("fault", ["unreachable", "silent", "garbage"])
async def test_an_upstream_that_fails_gives_502(provider: str, fault: str) -> None:
    async def handler(exchange: Exchange) -> None:
        if fault == "garbage":
            await exchange.send(f"{KEY} is not HTTP\r\n\r\n".encode())
        exchange.writer.close()

    target = MESSAGES if provider == "anthropic" else "/openai/v1/responses"
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with open_upstream(handler) as (faulty, _):
        url = nobody if fault == "unreachable" else faulty
        async with open_door(url) as door, httpx.AsyncClient(base_url=door.url) as client:
            with capture_logs() as logs:
                answers = [await client.post(target, content=b"{}") for _ in range(2)]
    for answer in answers:
        assert answer.status_code == 502
        error = answer.json()["error"]
        assert error["type"] == "api_error"
        assert f"{provider} API could not be reached" in error["message"]
        assert answer.json().get("type") == ("error" if provider == "anthropic" else None)
    assert [call.status for call in door.calls] == [502, 502]
    assert [(entry["event"], entry["run_id"], entry["upstream"]) for entry in logs] == [
        ("gateway_upstream_failed", "run-1", url)
    ] * 2
    assert KEY not in str(logs) + str([a.text for a in answers])


async def test_an_error_that_quotes_the_key() -> None:
    async def handler(exchange: Exchange) -> None:
        said = f'{{"error":{{"message":"bad key {exchange.headers["x-api-key"][0]}"}}}}'.encode()
        await exchange.answer(said, status=401, headers=f"WWW-Authenticate: Bearer {KEY}\r\n")

    async with open_upstream(handler) as (url, _), open_door(url) as door:
        answer = await door.post(MESSAGES)
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == "bad key " + "*" * len(KEY)
    assert KEY not in str(answer.headers)


async def test_a_redirect_is_not_followed() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"", status=307, headers="Location: http://127.0.0.1:9/\r\n")

    async with open_upstream(handler) as (url, seen), open_door(url) as door:
        assert (await door.post(MESSAGES)).status_code == 307
    assert len(seen) == 1


async def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:9")

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"direct")

    async with open_upstream(handler) as (url, _), open_door(url) as door:
        assert (await door.send(post(MESSAGES, b"", "Connection: close\r\n"))).endswith(b"direct")


async def test_many_at_once() -> None:
    together = asyncio.Barrier(50)

    async def handler(exchange: Exchange) -> None:
        await together.wait()  # all fifty are under way at the same time
        await exchange.answer(exchange.body)

    async def one(door: Door, number: int) -> bytes:
        return await door.send(post(MESSAGES, b"%d" % number, "Connection: close\r\n"))

    async with open_upstream(handler) as (url, _), open_door(url) as door, asyncio.timeout(60):
        got = await asyncio.gather(*(one(door, number) for number in range(50)))
    assert [answer.partition(b"\r\n\r\n")[2] for answer in got] == [b"%d" % number for number in range(50)]


async def test_close_ends_everything_at_once() -> None:
    ended = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: x\n\n")
        await at_eof(exchange)
        ended.set()

    async with open_upstream(handler) as (url, _), open_door(url) as door, asyncio.timeout(60):
        busy_reader, busy = await door.connect()
        idle_reader, idle = await door.connect()
        busy.write(post(MESSAGES))
        await busy_reader.readuntil(b"data: x")
        started = time.monotonic()
        await door.gateway.close()
        assert time.monotonic() - started < 1
        await ended.wait()
        for reader, writer in ((busy_reader, busy), (idle_reader, idle)):
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await reader.readexactly(100)
            writer.close()
            await writer.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await door.connect()
        await door.gateway.close()
        late = socket.create_server(("127.0.0.1", 0))
        await door.gateway.serve(late)
        assert late.fileno() == -1
    assert not door.calls[0].complete


async def test_several_listeners() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"ok")

    async with open_upstream(handler) as (url, _), open_door(url) as door:
        second = socket.create_server(("127.0.0.1", 0))
        port = second.getsockname()[1]
        await door.gateway.serve(second)
        for door_port in (door.port, port):
            door.port = door_port
            assert (await door.send(post(MESSAGES, b"", "Connection: close\r\n"))).endswith(b"ok")
    assert len(door.calls) == 2


async def test_an_answer_before_the_end_of_the_request() -> None:
    """The upstream turns a large upload down, and reads on so that the sender can see the answer."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"too much", status=413, headers="Connection: close\r\n")
        exchange.writer.write_eof()
        await exchange.reader.read()

    async with open_upstream(handler, read_body=False) as (url, _), open_door(url) as door:
        got = await door.send(post(MESSAGES, bytes(8 * 1024 * 1024), "Connection: close\r\n"))
    assert got.startswith(b"HTTP/1.1 413")
    assert got.endswith(b"too much")


async def test_an_error_before_the_end_of_the_request_ends_the_connection() -> None:
    async with open_door() as door:  # nobody listens at the upstream
        with capture_logs():
            got = await door.send(post(MESSAGES, bytes(8 * 1024 * 1024)))
    assert got.startswith(b"HTTP/1.1 502")
    assert b"connection: close" in got
    assert door.calls[0].status == 502


async def test_no_piece_waits_for_an_acknowledgement() -> None:
    """The listener here has protocol number 0, as a plain socket has: asyncio leaves Nagle's algorithm on."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"ok")

    took: list[float] = []
    async with open_upstream(handler) as (url, _), open_door(url) as door:
        reader, writer = await door.connect()
        for _ in range(60):
            started = time.perf_counter()
            writer.write(post(MESSAGES, b"{}"))
            await reader.readuntil(b"\r\n\r\nok")
            took.append(time.perf_counter() - started)
        writer.close()
        await writer.wait_closed()
    assert statistics.median(took) < 0.03
