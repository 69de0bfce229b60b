"""Requests that do not pass: the answer, the record of it, and no secret in either."""

from __future__ import annotations

import asyncio
import json

import pytest
from structlog.testing import capture_logs

from taskyard.gateway.calls import MAX_BODY
from taskyard.gateway.connection import MAX_FIELDS, MAX_HEAD
from taskyard.gateway.policy import Refusal
from taskyard.gateway.server import MAX_CONNECTIONS
from tests.support.door import KEY, Door, Exchange, open_door, open_upstream

POST = b"POST /anthropic/v1/messages HTTP/1.1\r\nHost: x\r\n"


async def refused(door: Door, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer; the connection is closed after it."""
    head, _, body = (await door.send(request)).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert headers["connection"] == "close"
    return int(first.split()[1]), headers, body


@pytest.mark.parametrize(
    ("request_line", "status", "method", "target"),
    [
        ("CONNECT example.org:443", 403, "CONNECT", "example.org:443"),
        ("CONNECT me:secret@example.org:443", 403, "CONNECT", "example.org:443"),
        ("GET http://example.org/a?token=secret", 403, "GET", "http://example.org/a"),
        ("GET http://me:secret@example.org/a", 403, "GET", "http://example.org/a"),
        (
            "POST http://127.0.0.1:3128/anthropic/v1/messages",
            403,
            "POST",
            "http://127.0.0.1:3128/anthropic/v1/messages",
        ),
        ("OPTIONS *", 403, "OPTIONS", "*"),
        ("GET /", 404, "GET", "/"),
        ("GET /admin?secret", 404, "GET", "/admin"),
        ("GET /openai/v1/files?secret", 404, "GET", "/openai/v1/files"),
        ("DELETE /openai/v1/responses", 405, "DELETE", "/openai/v1/responses"),
        ("PUT /anthropic/v1/messages?secret", 405, "PUT", "/anthropic/v1/messages"),
        ("GET /openai/v1/responses", 405, "GET", "/openai/v1/responses"),
    ],
)
async def test_not_open(request_line: str, status: int, method: str, target: str) -> None:
    async with open_door() as door:
        got, headers, body = await refused(door, f"{request_line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert got == status
    message = json.loads(body)["error"]["message"]
    [refusal] = door.refusals
    assert refusal == Refusal(method, target, refusal.reason, status)
    assert message == f"Taskyard: {refusal.reason}"
    assert "secret" not in str(refusal)
    assert ("allow" in headers) is (status == 405)
    assert not door.calls


async def test_a_provider_without_a_key() -> None:
    text = "no API key for {} is configured on this server: set {}"
    async with open_door(key=None) as door:
        status, _, body = await refused(door, POST + b"x-api-key: dummy\r\nContent-Length: 0\r\n\r\n")
        assert status == 403
        assert json.loads(body) == {
            "type": "error",
            "error": {
                "type": "permission_error",
                "message": f"Taskyard: {text.format('anthropic', 'ANTHROPIC_API_KEY')}",
            },
        }
        status, _, body = await refused(door, b"GET /openai/v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status == 403
        assert text.format("openai", "OPENAI_API_KEY") in json.loads(body)["error"]["message"]
    assert [refusal.status for refusal in door.refusals] == [403, 403]


async def test_an_answer_to_head_has_no_body() -> None:
    async with open_door() as door:
        status, headers, body = await refused(door, b"HEAD /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, body) == (404, b"")
    assert int(headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\nHost: y\r\n\r\n", 400),
        (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (POST + b"X: " + b"x" * MAX_HEAD + b"\r\n\r\n", 431),
        (POST + b"X: " + b"x" * MAX_HEAD, 431),
        (b"GET /" + b"x" * 2 * MAX_HEAD, 431),
        (POST + b"a:\r\n" * (MAX_FIELDS + 1) + b"\r\n", 431),
        (b"post /anthropic/v1/messages HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"connect allowed.test:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ],
)
async def test_not_readable(request_bytes: bytes, status: int) -> None:
    async with open_door() as door:
        got, _, body = await refused(door, request_bytes)
    assert got == status
    [refusal] = door.refusals
    assert refusal.status == status
    assert json.loads(body)["error"]["message"] == f"Taskyard: {refusal.reason}"


async def test_heads_up_to_the_limit_pass() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"ok")

    async with open_upstream(handler) as (url, seen), open_door(url) as door:
        value = b"x" * (MAX_HEAD - 200)
        got = await door.send(POST + b"Connection: close\r\nX: " + value + b"\r\n\r\n")
    assert got.endswith(b"ok")
    assert seen[0].headers["x"] == [value.decode()]


async def test_a_body_that_says_it_is_too_large() -> None:
    async with open_door() as door:
        status, _, _ = await refused(
            door, POST + f"Content-Length: {MAX_BODY + 1}\r\n\r\n".encode() + b"x" * 100_000
        )
    assert status == 413
    assert not door.calls, "the upstream must not hear of it"


async def test_a_body_that_turns_out_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskyard.gateway.calls.CallExchange.max_body", 100_000)

    async def handler(exchange: Exchange) -> None:
        raise AssertionError("the body must not arrive whole")

    async with open_upstream(handler) as (url, _), open_door(url) as door:
        chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        status, _, _ = await refused(door, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 10)
    assert status == 413
    assert [refusal.status for refusal in door.refusals] == [413]


async def test_a_body_in_bad_chunks() -> None:
    async def handler(exchange: Exchange) -> None:
        raise AssertionError("the body must not arrive whole")

    async with open_upstream(handler) as (url, _), open_door(url) as door:
        status, _, _ = await refused(door, POST + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n")
    assert status == 400
    assert [(refusal.method, refusal.status) for refusal in door.refusals] == [("POST", 400)]


async def test_too_many_connections() -> None:
    async with open_door() as door:
        held = [await door.connect() for _ in range(MAX_CONNECTIONS)]
        status, _, body = await refused(door, POST + b"Content-Length: 2\r\n\r\n{}")
        assert status == 503
        assert "64 connections" in json.loads(body)["error"]["message"]
        assert [refusal.status for refusal in door.refusals] == [503]
        # one leaves, one may come
        held[0][1].close()
        await held[0][1].wait_closed()
        async with asyncio.timeout(60):
            while (await refused(door, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 503:
                pass
        for _, writer in held[1:]:
            writer.close()
            await writer.wait_closed()


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskyard.gateway.connection.IDLE_S", 0.1)
    async with open_door() as door:
        assert await door.send(b"") == b""
        assert await door.send(b"GET / HT") == b""
    assert not door.refusals


async def test_a_body_that_never_comes_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskyard.gateway.connection.IDLE_S", 0.1)
    async with open_door(allowed_models=[["*"]]) as door:
        assert await door.send(POST + b"Content-Length: 5\r\n\r\n{") == b""


async def test_what_is_told_of_a_refusal_is_short() -> None:
    async with open_door() as door:
        await door.send(b"X" * 60_000 + b" /anthropic/v1/messages HTTP/1.1\r\nHost: x\r\n\r\n")
    [told] = door.refusals
    assert len(told.method) + len(told.target) + len(told.reason) < 2000


async def test_a_callback_that_fails_is_logged_without_values() -> None:
    async with open_door() as door:

        def fail(refusal: Refusal) -> None:
            raise ValueError(KEY)

        door.gateway._on_refusal = fail
        with capture_logs() as logs:
            assert await door.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    [entry] = logs
    assert (entry["event"], entry["error"]) == ("gateway_connection_failed", "ValueError")
    assert "connection.py" in entry["trace"]
    assert KEY not in str(entry)
