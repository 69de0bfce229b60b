"""Lets web pages of other origins use the links that work without credentials: uploads, downloads, logs."""

from __future__ import annotations

from collections.abc import Sequence

from litestar.datastructures import Headers
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from taskyard.objects.local import ROUTE

PATHS = (ROUTE, "/api/logs/")
METHODS = b"GET, HEAD, POST"
EXPOSED = b"Accept-Ranges, Content-Disposition, Content-Length, Content-Range, ETag"
MAX_AGE_S = b"600"


def cross_origin(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """The application, answering pages of these origins, or of every one for `*`, below PATHS.

    No cookie is ever allowed with it: the links are credentials in themselves.
    """

    def allowed(origin: str) -> list[tuple[bytes, bytes]]:
        if "*" in origins:
            return [(b"access-control-allow-origin", b"*")]
        vary = [(b"vary", b"Origin")]
        return (
            [(b"access-control-allow-origin", origin.encode("latin-1")), *vary] if origin in origins else vary
        )

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or not scope["path"].startswith(PATHS):
            await app(scope, receive, send)
            return
        headers = Headers.from_scope(scope)
        origin = headers.get("origin")
        if origin is None:
            await app(scope, receive, send)
            return
        added = allowed(origin)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            asked = headers.get("access-control-request-headers", "")
            added += [
                (b"access-control-allow-methods", METHODS),
                (b"access-control-allow-headers", asked.encode("latin-1")),
                (b"access-control-max-age", MAX_AGE_S),
                (b"content-length", b"0"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": added})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        added.append((b"access-control-expose-headers", EXPOSED))

        async def edit(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await app(scope, receive, edit)

    return wrapped
