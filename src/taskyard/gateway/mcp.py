"""The server's own tools for an agent: MCP by streamable HTTP at one path of the gateway.

One POST carries one JSON-RPC message, and the answer is one JSON object: the server begins nothing, so it offers no
stream, and it keeps nothing between two requests, so there are no sessions. Revisions with a handshake are spoken;
clients of the later ones fall back to it when their version is refused, as the protocol has it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import h11

from taskyard import __version__
from taskyard.gateway.exchange import Answer, Exchange, pieces
from taskyard.gateway.headers import Header
from taskyard.gateway.models import Refused
from taskyard.gateway.policy import Tool
from taskyard.gateway.upstream import UpstreamRequest, UpstreamResponse
from taskyard.schemas import DECODER

Json = dict[str, Any]

PATH = "/taskyard/mcp"
VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26")
"""Protocol revisions, the one first that is offered to a client of another."""
MAX_BODY = 1024 * 1024
AT_ONCE = 4
"""Messages of a run that are read and answered at once: as objects they take many times their size."""

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602
REFUSED = -32000

# Agents ask a person before tools that may do harm or reach outside. Those of the server do neither.
_ANNOTATIONS = {
    "readOnlyHint": False,
    "destructiveHint": False,
    "idempotentHint": True,
    "openWorldHint": False,
}


class RpcError(Exception):
    """A request that is answered with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def admit(tools: Sequence[Tool], calls: asyncio.Semaphore) -> Exchange | Refused:
    """What becomes of a request for PATH. calls: how many may be answered at once."""
    return McpExchange(tools, calls) if tools else Refused(404, "this run has no tools of the server's.")


class McpExchange(Exchange):
    """One request of an MCP client."""

    name = upstream = "the server's own tools"
    max_body = MAX_BODY

    def __init__(self, tools: Sequence[Tool], calls: asyncio.Semaphore) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._calls = calls

    async def request(self, head: h11.Request, body: AsyncIterator[bytes] | None) -> UpstreamRequest | Answer:
        headers = {name.lower(): value for name, value in head.headers}
        if b"origin" in headers:
            # A page in a browser that the agent started, whatever site it is of: no agent sends this.
            refused = Refused(403, "web pages may not call the tools of a run.")
            return replace(_refusal(403, refused.message), refused=refused)
        if head.method != b"POST":
            # Clients ask for a stream by GET and end a session by DELETE; that there are none is nothing to tell of.
            return Answer(405, b"", "application/json", headers=((b"allow", b"POST"),))
        version = headers.get(b"mcp-protocol-version", VERSIONS[-1].encode()).decode("latin-1")
        if version not in VERSIONS:
            known = ", ".join(VERSIONS)
            return _refusal(
                400, f"MCP {version} is not spoken here; begin with initialize, for one of {known}."
            )
        whole = bytearray()
        async for chunk in pieces(body):
            whole += chunk
        async with self._calls:
            try:
                message = DECODER.decode(whole.decode())
            except (ValueError, RecursionError):
                return _failure(400, None, PARSE_ERROR, "The body is no JSON, or is nested too deeply.")
            return await self._answer(message)

    async def _answer(self, message: Any) -> Answer:
        if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
            text = "The body must be one JSON-RPC 2.0 message; batches are not taken."
            return _failure(400, None, INVALID_REQUEST, text)
        method, number = message.get("method"), message.get("id")
        if "method" not in message and ("result" in message or "error" in message):
            return _ACCEPTED  # an answer, although nothing was asked
        if not isinstance(method, str):
            return _failure(400, None, INVALID_REQUEST, "method must be a text.")
        if "id" not in message:
            return _ACCEPTED
        if isinstance(number, bool) or not isinstance(number, (str, int)):
            return _failure(400, None, INVALID_REQUEST, "id must be a text or an integer.")
        params = message.get("params", {})
        try:
            if not isinstance(params, dict):
                raise RpcError(INVALID_PARAMS, "params must be an object.")  # noqa: TRY301 - one way for all
            result = await self._result(method, params)
        except RpcError as error:
            return _failure(200, number, error.code, str(error))
        return _json(200, {"jsonrpc": "2.0", "id": number, "result": result})

    async def _result(self, method: str, params: Json) -> Json:
        match method:
            case "initialize":
                asked = params.get("protocolVersion")
                return {
                    "protocolVersion": asked if asked in VERSIONS else VERSIONS[0],
                    "capabilities": {"tools": {}},
                    "serverInfo": {"name": "taskyard", "title": "Taskyard", "version": __version__},
                }
            case "ping":
                return {}
            case "tools/list":
                return {"tools": [_described(tool) for tool in self._tools.values()]}
            case "tools/call":
                return await self._call(params.get("name"), params.get("arguments", {}))
            case _:
                raise RpcError(METHOD_NOT_FOUND, f"Method not found: {method[:100]}")

    async def _call(self, name: Any, arguments: Any) -> Json:
        tool = self._tools.get(name) if isinstance(name, str) else None
        if tool is None:
            raise RpcError(INVALID_PARAMS, f"There is no such tool. Known: {', '.join(self._tools)}.")
        if not isinstance(arguments, dict):
            raise RpcError(INVALID_PARAMS, "arguments must be an object.")
        answer = await tool.call(arguments)
        return {"content": [{"type": "text", "text": answer.text}], "isError": answer.failed}

    def head(self, answer: UpstreamResponse) -> list[Header] | Answer:
        raise AssertionError("nothing was asked")


def _described(tool: Tool) -> Json:
    return {
        "name": tool.name,
        "description": tool.description,
        "inputSchema": tool.input_schema,
        "annotations": _ANNOTATIONS,
    }


def _json(status: int, message: Mapping[str, Any]) -> Answer:
    return Answer(status, json.dumps(message).encode(), "application/json")


def _failure(status: int, number: str | int | None, code: int, text: str) -> Answer:
    return _json(status, {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": text}})


def _refusal(status: int, text: str) -> Answer:
    return _failure(status, None, REFUSED, f"Taskyard: {text}")


_ACCEPTED = Answer(202, b"", "application/json")
