"""A server behind the way out of a sandbox, and a request to it from inside."""

from __future__ import annotations

import asyncio
import socket

FETCH = (
    "import urllib.request as u; print(u.urlopen('http://127.0.0.1:3128/hello', timeout=30).read().decode())"
)


class Served:
    """An HTTP server that answers with the requested path."""

    def __init__(self) -> None:
        self.listener: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self.asked = asyncio.Event()

    async def serve(self, listener: socket.socket) -> None:
        self.listener = listener
        self._server = await asyncio.start_server(self._answer, sock=listener)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        self.asked.set()
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path)
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()
