"""A scripted model server: it stands in for the paid model only, everything around it in a test is real.

It speaks Anthropic Messages, OpenAI Responses and OpenAI Chat Completions, streaming and not, as far as
Claude Code, Codex and other agents use them. What it "thinks" stands in the prompt, as directives:

    [[write:PATH|text]]       call the tool that writes a file (Codex's patches end it with a line break)
    [[bash:command]]          call the tool that runs a command (the command cannot contain "]]")
    [[tool:NAME|{json}]]      call the tool NAME with these arguments (MCP tools: mcp__SERVER__TOOL)
    [[text:words]]            say something
    [[slow:seconds]]          keep streaming dots for that long
    [[error:429|message]]     answer this HTTP status (each time: a retry gets it again)

One answer holds everything up to and including the next tool call. Which answer is due follows from the
request alone (tool results after the last user message with directives), so the server has no state: retries,
resume and parallel runs just work. Requests that are not the turn itself (titles and such) get a constant.

    async with model_endpoint() as endpoint:
        endpoint.url        # http://127.0.0.1:PORT ; Anthropic base URL; OpenAI's is url + "/v1"
        endpoint.requests   # what arrived, with headers

or `python -m tests.support.model_endpoint --port 8099`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import h11

from tests.support.model_wire import (
    CACHE_READ_TOKENS,
    CACHE_WRITE_TOKENS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    Call,
    Json,
    Step,
    Turn,
    anthropic_body,
    anthropic_events,
    anthropic_turns,
    chat_body,
    chat_events,
    chat_turns,
    responses_body,
    responses_events,
    responses_tools,
    responses_turns,
)

__all__ = [
    "ASIDE",
    "CACHE_READ_TOKENS",
    "CACHE_WRITE_TOKENS",
    "INPUT_TOKENS",
    "OUTPUT_TOKENS",
    "Endpoint",
    "RecordedRequest",
    "model_endpoint",
]

ASIDE = "Scripted answer."
"""The answer to whatever is not a scripted turn."""

_DIRECTIVE = re.compile(r"\[\[(write|bash|tool|text|slow|error):(.*?)\]\]", re.DOTALL)


@dataclass
class RecordedRequest:
    method: str
    target: str
    headers: dict[str, str]
    """Names in lower case; of repeated ones the last."""
    body: Any
    """Parsed JSON, or None."""
    answered: bool = False
    """The whole answer was sent; stays False when the client left before."""


@dataclass
class Endpoint:
    url: str
    requests: list[RecordedRequest] = field(default_factory=list)

    def model_calls(self) -> list[RecordedRequest]:
        """The requests that reported usage."""
        return [r for r in self.requests if r.method == "POST" and r.target.partition("?")[0] in APIS]


# --- the script ---


@dataclass
class ScriptedError(Exception):
    status: int
    message: str


def answer(turns: list[Turn], tools: list[Json]) -> list[Step]:
    """The steps of the answer that is due; raises ScriptedError."""
    scripted = [i for i, (who, text) in enumerate(turns) if who == "user" and _DIRECTIVE.search(text)]
    if not scripted:
        return [ASIDE]
    start = scripted[-1]
    prompt, after = turns[start][1], [who for who, _ in turns[start + 1 :]]
    if not tools and not prompt.lstrip().startswith("[["):
        return [ASIDE]  # a title of the prompt that it quotes
    if ("assistant", "user") in itertools.pairwise(after):
        return [ASIDE]  # the scripted turn is over, this is something later
    groups: list[list[tuple[str, str]]] = [[]]
    for kind, text in _DIRECTIVE.findall(prompt):
        groups[-1].append((kind, text))
        if kind in {"write", "bash", "tool"}:
            groups.append([])
    due = groups[min(after.count("result"), len(groups) - 1)]
    return [_step(kind, text, tools) for kind, text in due] or ["Done."]


def _step(kind: str, text: str, tools: list[Json]) -> Step:
    head, _, tail = text.partition("|")
    if kind == "text":
        return text
    if kind == "slow":
        return float(text)
    if kind == "error":
        raise ScriptedError(int(head), tail or "scripted error")
    if kind == "tool":
        server, _, name = head.rpartition("__")
        # Codex lists them so, or leaves them to its tool search.
        spaced = any(tool.get("type") in ("namespace", "tool_search") for tool in tools)
        return Call(name, tail or "{}", namespace=server) if server and spaced else Call(head, tail or "{}")
    call = _write(head, tail, tools) if kind == "write" else _run(text, tools)
    return call or f"(no tool is offered for {kind})"


def _offered(tools: list[Json], *names: str) -> tuple[str, dict[str, Any]] | None:
    for tool in tools:
        inner = tool.get("function", tool)
        if inner.get("name") in names:
            schema = inner.get("input_schema") or inner.get("parameters") or {}
            return inner["name"], {"custom": tool.get("type") == "custom", **schema.get("properties", {})}
    return None


def _write(path: str, text: str, tools: list[Json]) -> Call | None:
    if found := _offered(tools, "Write", "write", "write_file"):
        name, properties = found
        key = next((k for k in ("file_path", "filePath", "path") if k in properties), "file_path")
        return Call(name, json.dumps({key: path, "content": text}))
    if (found := _offered(tools, "apply_patch")) and found[1]["custom"]:
        lines = "".join(f"+{line}\n" for line in text.removesuffix("\n").split("\n"))
        patch = f"*** Begin Patch\n*** Add File: {path}\n{lines}*** End Patch\n"
        return Call("apply_patch", patch, custom=True)
    folder = shlex.quote(str(PurePosixPath(path).parent))
    return _run(f"mkdir -p {folder} && printf %s {shlex.quote(text)} > {shlex.quote(path)}", tools)


def _run(command: str, tools: list[Json]) -> Call | None:
    if found := _offered(tools, "exec_command"):
        return Call("exec_command", json.dumps({"cmd": command}))
    if (found := _offered(tools, "exec")) and found[1]["custom"]:
        call = f"tools.exec_command({json.dumps({'cmd': command})})"
        return Call("exec", f"const r = await {call}; text(JSON.stringify(r));", custom=True)
    if found := _offered(tools, "Bash", "bash", "run_shell_command", "shell_command", "shell"):
        name, properties = found
        array = properties.get("command", {}).get("type") == "array"
        arguments: Json = {"command": ["bash", "-lc", command] if array else command}
        if "description" in properties:
            arguments["description"] = "scripted"
        return Call(name, json.dumps(arguments))
    return None


# --- HTTP ---


@dataclass(frozen=True)
class Api:
    turns: Callable[[Json], list[Turn]]
    tools: Callable[[Json], list[Json]]
    events: Callable[[str, list[Step]], AsyncIterator[Json]]
    body: Callable[[str, list[Step]], Awaitable[Json]]


def plain_tools(body: Json) -> list[Json]:
    return body.get("tools") or []


APIS = {
    "/v1/messages": Api(anthropic_turns, plain_tools, anthropic_events, anthropic_body),
    "/v1/responses": Api(responses_turns, responses_tools, responses_events, responses_body),
    "/v1/chat/completions": Api(chat_turns, plain_tools, chat_events, chat_body),
}


class _Connection:
    """One client connection."""

    def __init__(self, endpoint: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.endpoint, self.reader, self.writer = endpoint, reader, writer
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=256 * 1024)

    async def run(self) -> None:
        while (request := await self._request()) is not None:
            self.endpoint.requests.append(request)
            await self._answer(request)
            request.answered = True
            if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
                return
            self.http.start_next_cycle()

    async def _request(self) -> RecordedRequest | None:
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                if self.http.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                self.http.receive_data(await self.reader.read(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                headers = {name.decode().lower(): value.decode("latin-1") for name, value in head.headers}
                try:
                    parsed = json.loads(body) if body else None
                except ValueError:
                    parsed = None
                return RecordedRequest(head.method.decode(), head.target.decode(), headers, parsed)
            else:
                return None  # closed

    async def _send(self, *events: h11.Event) -> None:
        for event in events:
            if data := self.http.send(event):
                self.writer.write(data)
        await self.writer.drain()

    async def _json(self, body: Json, status: int = 200, *, with_body: bool = True) -> None:
        data = json.dumps(body).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
        parts = [h11.Data(data=data)] if with_body else []
        await self._send(h11.Response(status_code=status, headers=headers), *parts, h11.EndOfMessage())

    async def _answer(self, request: RecordedRequest) -> None:
        path = request.target.partition("?")[0]
        if request.method == "POST" and path in APIS:
            return await self._model_call(APIS[path], request.body)
        match request.method, path:
            case "POST", "/v1/messages/count_tokens":
                return await self._json({"input_tokens": INPUT_TOKENS})
            case "GET", "/v1/models":
                models = [{"id": name, "object": "model"} for name in ("claude-scripted", "gpt-scripted")]
                return await self._json({"object": "list", "data": models})
            case (("HEAD" | "GET"), "/api/hello"):
                return await self._json({"message": "hello"}, with_body=request.method == "GET")
            case _:
                return await self._json({"error": {"message": f"no such path: {path}"}}, 404)

    async def _model_call(self, api: Api, body: Json) -> None:
        model = body.get("model", "scripted")
        try:
            steps = answer(api.turns(body), api.tools(body))
        except ScriptedError as error:
            kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, "api_error")
            answered: Json = {"type": "error"} if api is APIS["/v1/messages"] else {}
            answered["error"] = {"type": kind, "message": error.message}
            return await self._json(answered, error.status)
        if not body.get("stream"):
            return await self._json(await api.body(model, steps))
        await self._send(h11.Response(status_code=200, headers=[("Content-Type", "text/event-stream")]))
        number = 0
        async for event in api.events(model, steps):
            name = f"event: {event['type']}\n" if "type" in event else ""
            if api is APIS["/v1/responses"]:
                event["sequence_number"] = number
                number += 1
            await self._send(h11.Data(data=f"{name}data: {json.dumps(event)}\n\n".encode()))
        if api is APIS["/v1/chat/completions"]:
            await self._send(h11.Data(data=b"data: [DONE]\n\n"))
        return await self._send(h11.EndOfMessage())


@asynccontextmanager
async def model_endpoint(port: int = 0) -> AsyncIterator[Endpoint]:
    """Serve on 127.0.0.1; leaving the block ends every connection."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await _Connection(endpoint, reader, writer).run()
        except (ConnectionError, h11.RemoteProtocolError, asyncio.CancelledError):
            pass  # the client left, or the block ended
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port)
    endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield endpoint
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def _main() -> None:
    parser = argparse.ArgumentParser(description="Serve the scripted model endpoint.")
    parser.add_argument("--port", type=int, default=0)
    async with model_endpoint(parser.parse_args().port) as endpoint:
        print(endpoint.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
