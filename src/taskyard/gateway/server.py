"""The host side of the one door: an HTTP/1.1 server for one run, on listening sockets bound inside its sandbox."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import ssl
import traceback
from collections.abc import Awaitable, Callable

import certifi
import structlog

from taskyard.gateway.budget import Budget
from taskyard.gateway.connection import Connection, Side
from taskyard.gateway.egress import Traffic
from taskyard.gateway.models import ModelRoute, Refused
from taskyard.gateway.policy import GitRepository, Network, Policy, Refusal, Tool, ToolAnswer
from taskyard.gateway.upstream import Upstream
from taskyard.gateway.usage import ModelCall, Usage

__all__ = [
    "Budget", "Gateway", "GitRepository", "ModelCall", "ModelRoute", "Network", "Policy", "Refusal", "Tool",
    "ToolAnswer", "Usage",
]  # fmt: skip

MAX_CONNECTIONS = 64

log = structlog.get_logger()


class Gateway:
    """Serves one run until `close()`.

    `on_refusal`, `on_usage` and `on_budget` are called on the event loop and must not block. An agent decides how
    often `on_refusal` is called, so whatever stores refusals should bound them. `on_budget` is called once, with a
    sentence, when the budget is used up; `over_budget` tells it at any time. `usage`: of earlier workers of the run.
    `on_close` is awaited at the end of `close()`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        on_refusal: Callable[[Refusal], None],
        on_usage: Callable[[ModelCall], None],
        on_budget: Callable[[str], None] | None = None,
        usage: Usage | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.usage = usage or Usage()
        self._policy = policy
        self._on_refusal = on_refusal
        self._on_usage = on_usage
        self._on_budget = on_budget
        self._on_close = on_close
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._upstream = Upstream(_tls())
        self._side = Side(
            policy, self._upstream, Traffic(policy.network.max_bytes), self._refused, self._called
        )

    @property
    def over_budget(self) -> str | None:
        """Why the run may make no more model calls, as a sentence; None while it may."""
        return self._policy.budget.exceeded

    async def serve(self, listener: socket.socket) -> None:
        """Accept on this listening socket, in the background, until `close()`; the socket is then closed.

        May be called again with further sockets: each process of a sandbox brings its own.
        """
        if self._closed:
            listener.close()
            return
        self._servers.append(await asyncio.start_server(self._serve_connection, sock=listener))

    async def close(self) -> None:
        """End every connection and upstream call at once. Idempotent."""
        self._closed = True
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()
        self._upstream.close()
        if (on_close := self._on_close) is not None:
            self._on_close = None
            await on_close()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # asyncio sets it only on sockets made with an explicit protocol number. Without it the pieces of a stream
            # wait for the other side's delayed acknowledgement, 40 ms each.
            inner = writer.get_extra_info("socket")
            if inner.family != socket.AF_UNIX:
                inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._converse(Connection(reader, writer, self._side))
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()  # the client has left, or close() was called
        except Exception as error:
            # uvloop says it so when the client has left.
            if not (isinstance(error, RuntimeError) and writer.is_closing()):
                # Neither the text nor the variables of the frames: they could hold the key.
                log.error(  # noqa: TRY400 (see above)
                    "gateway_connection_failed",
                    run_id=self._policy.run_id,
                    error=type(error).__name__,
                    trace="".join(traceback.format_tb(error.__traceback__)),
                )
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _converse(self, connection: Connection) -> None:
        if self._closed or len(self._tasks) > 2 * MAX_CONNECTIONS:
            raise ConnectionAbortedError
        if len(self._tasks) > MAX_CONNECTIONS:
            message = f"this sandbox has {MAX_CONNECTIONS} connections open already."
            await connection.refuse(Refused(503, message))
        else:
            await connection.run()

    def _refused(self, refusal: Refusal) -> None:
        self._on_refusal(refusal)

    def _called(self, call: ModelCall) -> None:
        self.usage.add(call)
        self._on_usage(call)
        if self._on_budget is not None and (reason := self.over_budget) is not None:
            on_budget, self._on_budget = self._on_budget, None
            on_budget(reason)


@functools.cache
def _tls() -> ssl.SSLContext:
    """Shared, because loading the certificates takes some 20 ms. Heeds SSL_CERT_FILE and SSL_CERT_DIR."""
    if file := os.environ.get("SSL_CERT_FILE"):
        context = ssl.create_default_context(cafile=file)
    elif folder := os.environ.get("SSL_CERT_DIR"):
        context = ssl.create_default_context(capath=folder)
    else:
        context = ssl.create_default_context(cafile=certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context
