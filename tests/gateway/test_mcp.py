"""The server's own tools by MCP: the protocol as its clients speak it, and what no client would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from taskyard.gateway.mcp import AT_ONCE, MAX_BODY, PATH, VERSIONS
from taskyard.gateway.server import Tool, ToolAnswer
from tests.support.door import Door, eventually, open_door

Json = dict[str, Any]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


class Asked:
    """A tool, and the arguments of its calls."""

    def __init__(self) -> None:
        self.calls: list[Json] = []
        self.running = self.most = 0
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.tool = Tool("count", "Counts.", SCHEMA, self.call)

    async def call(self, arguments: Json) -> ToolAnswer:
        self.calls.append(arguments)
        self.running += 1
        self.most = max(self.most, self.running)
        await self.go_on.wait()
        self.running -= 1
        return ToolAnswer(f"got {json.dumps(arguments)}", failed="bad" in arguments)


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
async def door(asked: Asked) -> AsyncIterator[Door]:
    async with open_door(tools=[asked.tool]) as door:
        yield door


async def send(door: Door, body: Any, method: str = "POST", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(base_url=door.url, timeout=60) as client:
        return await client.request(method, PATH, content=content, headers=sent)


async def ask(door: Door, method: str, params: Any = None, **headers: str) -> Json:
    """The answer to a request that is one."""
    message = {"jsonrpc": "2.0", "id": "a", "method": method} | ({} if params is None else {"params": params})
    response = await send(door, message, **headers)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    answer: Json = response.json()
    assert answer["jsonrpc"] == "2.0"
    assert answer["id"] == "a"
    assert len(answer) == 3
    return answer


@pytest.mark.parametrize(
    ("version", "agreed"),
    [*((version, version) for version in VERSIONS), ("2024-11-05", VERSIONS[0]), (None, VERSIONS[0])],
)
async def test_handshake(door: Door, version: str | None, agreed: str) -> None:
    params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}}
    result = (await ask(door, "initialize", params))["result"]
    assert result["protocolVersion"] == agreed
    assert result["capabilities"] == {"tools": {}}
    assert result["serverInfo"]["name"] == "taskyard"
    ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    response = await send(door, ready, mcp_protocol_version=agreed)
    assert (response.status_code, response.content) == (202, b"")
    assert "mcp-session-id" not in response.headers
    assert (await ask(door, "ping", mcp_protocol_version=agreed))["result"] == {}


async def test_tools(door: Door, asked: Asked) -> None:
    [tool] = (await ask(door, "tools/list", {"_meta": {"progressToken": 0}}))["result"]["tools"]
    assert (tool["name"], tool["description"], tool["inputSchema"]) == ("count", "Counts.", SCHEMA)
    # With other hints Codex asks a person before each call.
    assert (tool["annotations"]["destructiveHint"], tool["annotations"]["openWorldHint"]) == (False, False)
    for arguments, text in (({"n": 1}, 'got {"n": 1}'), ({"bad": "é"}, 'got {"bad": "\\u00e9"}')):
        result = (await ask(door, "tools/call", {"name": "count", "arguments": arguments}))["result"]
        assert result == {"content": [{"type": "text", "text": text}], "isError": "bad" in arguments}
    assert (await ask(door, "tools/call", {"name": "count"}))["result"]["isError"] is False
    assert asked.calls == [{"n": 1}, {"bad": "é"}, {}]


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("server/discover", {}, -32601),
        ("resources/list", {}, -32601),
        ("x" * 100_000, {}, -32601),
        ("tools/call", {}, -32602),
        ("tools/call", {"name": "rm"}, -32602),
        ("tools/call", {"name": ["count"]}, -32602),
        ("tools/call", {"name": "count", "arguments": [1]}, -32602),
        ("tools/call", {"name": "count", "arguments": None}, -32602),
        ("tools/list", [1], -32602),
        ("ping", "x", -32602),
    ],
)
async def test_requests_that_are_refused(
    door: Door, asked: Asked, method: str, params: Any, code: int
) -> None:
    error = (await ask(door, method, params))["error"]
    assert error["code"] == code
    assert 0 < len(error["message"]) < 300
    assert asked.calls == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xff\xfe", -32700),
        ("{}".encode("utf-16"), -32700),
        (b'{"jsonrpc":"2.0","id":NaN,"method":"ping"}', -32700),
        (b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"ping"}', -32700),
        (b"[" * 200_000 + b"]" * 200_000, -32700),
        (b"null", -32600),
        (b'"ping"', -32600),
        ([{"jsonrpc": "2.0", "id": 1, "method": "ping"}], -32600),
        ({"id": 1, "method": "ping"}, -32600),
        ({"jsonrpc": "1.0", "id": 1, "method": "ping"}, -32600),
        ({"jsonrpc": "2.0", "id": 1}, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": 7}, -32600),
        ({"jsonrpc": "2.0", "id": None, "method": "ping"}, -32600),
        ({"jsonrpc": "2.0", "id": True, "method": "ping"}, -32600),
        ({"jsonrpc": "2.0", "id": {}, "method": "ping"}, -32600),
    ],
)
async def test_bodies_that_are_no_request(door: Door, body: Any, code: int) -> None:
    response = await send(door, body)
    assert response.status_code == 400
    answer = response.json()
    assert (answer["id"], answer["error"]["code"]) == (None, code)


@pytest.mark.parametrize(
    "message",
    [
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
        {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "count", "arguments": {}}},
        {"jsonrpc": "2.0", "id": 1, "result": {}},
        {"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "x"}},
    ],
)
async def test_what_wants_no_answer_gets_none(door: Door, asked: Asked, message: Json) -> None:
    response = await send(door, message)
    assert (response.status_code, response.content) == (202, b"")
    assert asked.calls == []


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "HEAD"])
async def test_there_are_no_streams_and_no_sessions(door: Door, method: str) -> None:
    response = await send(door, b"", method, accept="text/event-stream")
    assert (response.status_code, response.headers["allow"], response.content) == (405, "POST", b"")
    assert door.refusals == [], "each client asks, and nobody has to hear of it"


@pytest.mark.parametrize("version", ["2026-07-28", "2024-11-05", "x", ""])
async def test_a_version_that_is_not_spoken(door: Door, version: str) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "server/discover"}
    response = await send(door, message, mcp_protocol_version=version)
    assert response.status_code == 400
    # The later protocol's own code would keep its clients from falling back to the handshake.
    assert response.json()["error"]["code"] == -32000
    assert VERSIONS[0] in response.json()["error"]["message"]


async def test_pages_in_a_browser_may_not_call(door: Door, asked: Asked) -> None:
    message = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "count", "arguments": {}},
    }
    for origin in ("https://evil.example", "null", door.url):
        assert (await send(door, message, origin=origin)).status_code == 403
    assert asked.calls == []
    assert [(refusal.target, refusal.status) for refusal in door.refusals] == [(PATH, 403)] * 3


async def test_a_body_has_a_limit(door: Door, asked: Asked) -> None:
    params = {"name": "count", "arguments": {"n": "x" * MAX_BODY}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    body = json.dumps(message).encode()
    assert (await send(door, body)).status_code == 413

    async def pieces() -> AsyncIterator[bytes]:
        yield body

    assert (await door.post(PATH, pieces())).status_code == 413
    assert asked.calls == []
    params["arguments"] = {"n": "x" * (MAX_BODY - 1000)}
    assert "result" in (await ask(door, "tools/call", params))


async def test_one_connection_for_many_requests(door: Door) -> None:
    async with httpx.AsyncClient(base_url=door.url, timeout=60) as client:
        statuses = [
            (await client.request(method, PATH, content=content)).status_code
            for method, content in (("POST", b"{"), ("GET", b""), ("POST", b"[]"), ("DELETE", b""))
        ]
        streams = client._transport._pool.connections  # type: ignore[attr-defined]
        assert len(streams) == 1
    assert statuses == [400, 405, 400, 405]


async def test_calls_wait_for_each_other(door: Door, asked: Asked) -> None:
    asked.go_on.clear()
    params = {"name": "count", "arguments": {}}
    calls = [asyncio.create_task(ask(door, "tools/call", params)) for _ in range(3 * AT_ONCE)]
    await eventually(lambda: asked.running == AT_ONCE, "the first calls have not begun")
    asked.go_on.set()
    await asyncio.gather(*calls)
    assert (asked.most, len(asked.calls)) == (AT_ONCE, 3 * AT_ONCE)


async def test_a_client_that_leaves_ends_its_call(door: Door, asked: Asked) -> None:
    asked.go_on.clear()
    params = {"name": "count", "arguments": {}}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(2 * AT_ONCE):
        _, writer = await door.connect()
        writer.write(head + body)
        await writer.drain()
        await eventually(lambda: bool(asked.calls), "a call has not begun")
        writer.close()
        await writer.wait_closed()
        asked.calls.clear()
    asked.go_on.set()
    assert (await ask(door, "tools/call", params))["result"]["isError"] is False


async def test_a_run_without_tools() -> None:
    async with open_door() as door:
        response = await send(door, {"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
        assert response.status_code == 404
        assert "no tools" in response.text
        assert [refusal.target for refusal in door.refusals] == [PATH]


@pytest.mark.parametrize("path", [PATH + "/", PATH + "x", "/taskyard", "/taskyard/../taskyard/mcp"])
async def test_other_paths_are_not_it(door: Door, asked: Asked, path: str) -> None:
    answer = await door.send(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
