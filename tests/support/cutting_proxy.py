"""A TCP proxy that cuts connections at random places."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Proxy:
    url: str
    connections: int = 0
    cuts: int = 0


@asynccontextmanager
async def cutting_proxy(
    upstream: str, room: Callable[[random.Random], int | None], seed: int
) -> AsyncIterator[Proxy]:
    """Passes bytes on. Each connection gets `room` bytes from the server, then it is reset or closed; None: all."""
    to = urlsplit(upstream)
    chance = random.Random(seed)
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.connections += 1
        left, reset = room(chance), chance.random() < 0.5
        server_reader, server_writer = await asyncio.open_connection(to.hostname, to.port)
        writers.append(server_writer)
        upwards = asyncio.create_task(up(reader, server_writer))
        try:
            with suppress(ConnectionError):
                while data := await server_reader.read(4096):
                    writer.write(data if left is None else data[:left])
                    await writer.drain()
                    if left is not None:
                        left -= len(data)
                        if left <= 0:
                            proxy.cuts += 1
                            if reset:
                                writer.transport.abort()
                            return
        finally:
            upwards.cancel()
            server_writer.close()
            writer.close()
            await asyncio.wait({upwards})

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        task = asyncio.create_task(handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    proxy = Proxy(f"http://{host}:{port}")
    try:
        yield proxy
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
