"""A gateway on a real listening socket, and a bare upstream whose every byte a test decides."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import httpx

from taskyard.gateway.server import Gateway, ModelCall, ModelRoute, Policy, Refusal

KEY = "sk-test-0123456789-very-secret"


async def eventually(condition: Callable[[], bool], message: str) -> None:
    """Wait up to a minute for it."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, message
        await asyncio.sleep(0.01)


@dataclass
class Door:
    """A gateway with what it told."""

    gateway: Gateway
    port: int
    refusals: list[Refusal]
    calls: list[ModelCall]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def post(self, target: str, body: bytes | AsyncIterator[bytes] = b"") -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            return await client.post(target, content=body)

    async def send(self, request: bytes) -> bytes:
        """Everything that comes back on a fresh connection until it is closed."""
        reader, writer = await self.connect()
        try:
            writer.write(request)
            async with asyncio.timeout(60):
                return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()


@asynccontextmanager
async def open_door(
    base_url: str = "http://127.0.0.1:9",
    key: str | None = KEY,
    routes: Mapping[str, ModelRoute] | None = None,
    on_budget: Callable[[str], None] | None = None,
    **rules: Any,
) -> AsyncIterator[Door]:
    """A gateway that sends both APIs to `base_url`, or to the `routes`. `rules`: further fields of the policy."""
    route = ModelRoute(base_url, key)
    policy = Policy("run-1", {"anthropic": route, "openai": route} if routes is None else routes, **rules)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    refusals: list[Refusal] = []
    calls: list[ModelCall] = []
    gateway = Gateway(policy, on_refusal=refusals.append, on_usage=calls.append, on_budget=on_budget)
    try:
        await gateway.serve(listener)
        yield Door(gateway, port, refusals, calls)
    finally:
        await gateway.close()


@dataclass
class Exchange:
    """One request at the upstream."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    method: str = ""
    target: str = ""
    headers: dict[str, list[str]] = field(default_factory=dict)
    body: bytes = b""

    async def read_until(self, token: bytes) -> None:
        """Add to `body`, raw, until the token is in it."""
        while token not in self.body:
            data = await self.reader.read(65536)
            assert data, f"the request ended before {token!r}"
            self.body += data

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes, status: int = 200, headers: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        await self.send(head.encode() + body)


Handler = Callable[[Exchange], Awaitable[None]]


@asynccontextmanager
async def open_upstream(
    handler: Handler, *, read_body: bool = True
) -> AsyncIterator[tuple[str, list[Exchange]]]:
    """A server that calls `handler` for each request, with its body or (read_body=False) before it.

    Gives its URL and the list of what arrived.
    """
    seen: list[Exchange] = []
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        http = h11.Connection(h11.SERVER)
        exchange = Exchange(reader, writer)
        try:
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Request):
                    exchange = Exchange(reader, writer, event.method.decode(), event.target.decode())
                    for name, value in event.headers:
                        exchange.headers.setdefault(name.decode(), []).append(value.decode())
                    seen.append(exchange)
                    if not read_body:
                        exchange.body = http.trailing_data[0]
                        await handler(exchange)
                        return
                elif isinstance(event, h11.Data):
                    exchange.body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    await handler(exchange)
                    http = h11.Connection(h11.SERVER)
                else:
                    return
        except (ConnectionError, asyncio.CancelledError, h11.RemoteProtocolError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
