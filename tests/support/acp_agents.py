"""Agents over real pipes: a connection to a program, or to a few lines of Python that play one.

Everything that the client sends is checked against the published schema of ACP.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from acp import schema
from pydantic import BaseModel

from taskyard.agents.acp import METHOD_NOT_FOUND, AcpConnection, AcpError

Json = dict[str, Any]

DEADLINE_S = 60.0

PRELUDE = """
import json, os, sys, time
def raw(text): sys.stdout.write(text); sys.stdout.flush()
def send(message): raw(json.dumps({"jsonrpc": "2.0", **message}) + "\\n")
def read():
    line = sys.stdin.readline()
    return json.loads(line) if line else sys.exit()
def update(text, session="s"):
    block = {"type": "text", "text": str(text)}
    chunk = {"sessionUpdate": "agent_message_chunk", "content": block}
    send({"method": "session/update", "params": {"sessionId": session, "update": chunk}})
def answer(request, **result): send({"id": request["id"], "result": result})
"""

SENT: dict[str, type[BaseModel]] = {
    "initialize": schema.InitializeRequest,
    "session/new": schema.NewSessionRequest,
    "session/load": schema.LoadSessionRequest,
    "session/resume": schema.ResumeSessionRequest,
    "session/prompt": schema.PromptRequest,
    "session/cancel": schema.CancelNotification,
    "session/close": schema.CloseSessionRequest,
    "session/set_mode": schema.SetSessionModeRequest,
}
NOT_IN_SCHEMA = {"session/set_title", "session/set_model"}


def check_sent(message: Json) -> None:
    """A message of the client is what the schema says, and nothing besides."""
    assert message["jsonrpc"] == "2.0"
    method, params = message.get("method"), dict(message.get("params") or {})
    if method is None:
        if "outcome" in message.get("result", {}):
            _check(schema.RequestPermissionResponse, message["result"])
        return
    params.pop("systemPrompt", None)  # an extension: sent only where it is advertised
    if method == "session/set_config_option":
        boolean = isinstance(params["value"], bool)
        _check(
            schema.SetSessionConfigOptionBooleanRequest
            if boolean
            else schema.SetSessionConfigOptionSelectRequest,
            params,
        )
    elif method not in NOT_IN_SCHEMA:
        _check(SENT[method], params)


def _check(model: type[BaseModel], value: Json) -> None:
    assert model.model_validate(value).model_dump(mode="json", by_alias=True, exclude_unset=True) == value


@dataclass
class Client:
    """A connection and what came over it."""

    process: asyncio.subprocess.Process
    updates: list[Json] = field(default_factory=list)
    traffic: list[tuple[str, Json]] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)
    connection: AcpConnection = field(init=False)

    @property
    def texts(self) -> list[str]:
        """The texts of all message chunks, in order."""
        return [
            params["update"]["content"]["text"]
            for params in self.updates
            if params["update"]["sessionUpdate"] == "agent_message_chunk"
        ]

    def sent(self, method: str) -> list[Json]:
        """`params` of everything that was sent under a method name."""
        return [
            message["params"]
            for way, message in self.traffic
            if way == "out" and message.get("method") == method
        ]

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that a callback changes."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not condition():  # noqa: ASYNC110 - a condition of any kind, not one event
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"not within {DEADLINE_S:g} s: {what}; updates: {self.texts}") from None


async def refuse(method: str, params: Json) -> Json:
    """A client that offers nothing."""
    raise AcpError(METHOD_NOT_FOUND, f"unknown: {method}")


@asynccontextmanager
async def connected(
    command: Sequence[str],
    *,
    on_request: Callable[[str, Json], Awaitable[Json]] = refuse,
    on_update: Callable[[Json], None] | None = None,
    before_read: Callable[[], Awaitable[None]] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: dict[str, str] | None = None,
    check: bool = True,
) -> AsyncIterator[Client]:
    """Start a program and connect to it; afterwards the program and its children are gone."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=cwd,
        env=env,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    client = Client(process)

    def on_traffic(way: Literal["in", "out"], message: Json) -> None:
        client.traffic.append((way, message))

    client.connection = AcpConnection(
        process.stdout,
        process.stdin,
        on_update=on_update or client.updates.append,
        on_request=on_request,
        on_traffic=on_traffic,
        on_noise=client.noise.append,
        before_read=before_read,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield client
    finally:
        try:
            await client.connection.close()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            while await process.stdout.read(1 << 20):
                pass
            await process.wait()
    if check:
        for way, message in client.traffic:
            if way == "out":
                check_sent(message)


def inline(source: str) -> list[str]:
    """The command of an agent that runs these lines after PRELUDE."""
    return [sys.executable, "-I", "-c", PRELUDE + source]
