"""Lets web pages of other origins use the API (with a key of their own), and links that work without credentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from litestar.datastructures import Headers
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from taskyard.objects.local import ROUTE
from taskyard.settings import Settings

LINKS = (ROUTE, "/api/logs/")
API = ("/api/", "/oauth/token", "/oauth/revoke", "/.well-known/oauth-authorization-server")
MAX_AGE_S = b"600"
EXPOSED = (
    b"Accept-Ranges, Content-Disposition, Content-Length, Content-Range, ETag, Idempotent-Replayed, Retry-After,"
    b" Server-Timing, X-Filtered-Count, X-Has-More, X-Matching-Count, X-Total-Count"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """Which pages may use the paths with these beginnings; `*` is every page."""

    paths: tuple[str, ...]
    origins: Sequence[str]
    methods: bytes

    def allows(self, origin: str) -> list[tuple[bytes, bytes]]:
        """The headers that let a page of an origin in, or keep it out."""
        if "*" in self.origins:
            return [(b"access-control-allow-origin", b"*")]
        vary = [(b"vary", b"Origin")]
        if origin not in self.origins:
            return vary
        return [(b"access-control-allow-origin", origin.encode("latin-1")), *vary]


def rules(settings: Settings) -> tuple[Rule, ...]:
    """The first that has the path counts."""
    links = Rule(LINKS, settings.objects.cors_origins, b"GET, HEAD, POST")
    return links, Rule(API, settings.cors_origins, b"DELETE, GET, HEAD, PATCH, POST, PUT")


def cross_origin(app: ASGIApp, rules: Sequence[Rule]) -> ASGIApp:
    """The application, answering pages of other origins by the rules.

    No cookie is ever allowed with it: a page has to bring a key of its own, or a link that is one.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        headers = Headers.from_scope(scope)
        origin = headers.get("origin")
        rule = next((rule for rule in rules if scope["path"].startswith(rule.paths)), None)
        if rule is None or not rule.origins or origin is None:
            await app(scope, receive, send)
            return
        added = rule.allows(origin)
        if scope.get("method") == "OPTIONS" and "access-control-request-method" in headers:
            asked = headers.get("access-control-request-headers", "")
            added += [
                (b"access-control-allow-methods", rule.methods),
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
