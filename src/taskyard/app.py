"""The ASGI application: routes, error answers, and the parts that live as long as it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import structlog
from litestar import Litestar, MediaType, Request, Response, get
from litestar.datastructures import State
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from taskyard.accounts.routes import ROUTES as ACCOUNTS
from taskyard.agents.adapters import adapters
from taskyard.artifacts.api import RunArtifactController, StagedArtifactController
from taskyard.automations.api import AutomationController
from taskyard.commands.api import CommandController
from taskyard.cors import cross_origin, rules
from taskyard.db.engine import Database
from taskyard.db.hub import Hub
from taskyard.environments.api import EnvironmentController
from taskyard.errors import (
    InvalidInputError,
    MethodNotAllowedError,
    NotFoundError,
    ServiceUnavailableError,
    TaskyardError,
)
from taskyard.events.record import Record
from taskyard.events.tail import Tails
from taskyard.forge.api import RepositoryController
from taskyard.http import answer, encode
from taskyard.idempotency import idempotent
from taskyard.objects.api import download, upload
from taskyard.objects.service import open_store
from taskyard.openapi.api import ROUTES as OPENAPI
from taskyard.runs.api import RunController
from taskyard.runs.log_api import RunLogController, event_stream, signed_log
from taskyard.runs.tokens import RunTokens
from taskyard.security import Signer
from taskyard.settings import Settings
from taskyard.tasks.api import TaskController
from taskyard.tasks.inserts import Inserts

log = structlog.get_logger()


def asgi(app: Litestar, settings: Settings) -> ASGIApp:
    """The API as a server runs it: it also answers HEAD, OPTIONS, browsers of other origins, and at its stop."""
    return cross_origin(until_the_stop(heads_and_options(app)), rules(settings))


def application(settings: Settings, database: Database) -> Litestar:
    """The API over an open, migrated database."""

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        hub = Hub(database.url)
        await hub.start()
        row = await database.fetch_one("SELECT key FROM signing_keys WHERE name = 'urls'")
        assert row is not None
        run_tokens = await RunTokens.load(database)
        objects = await open_store(settings, database)
        app.state["objects"] = objects
        record = Record(database, objects)
        app.state.update({"record": record, "tails": Tails(record, hub)})
        app.state.update({"hub": hub, "signer": Signer(bytes(row["key"])), "run_tokens": run_tokens})
        try:
            yield
        finally:
            await objects.close()
            await hub.stop()

    return Litestar(
        route_handlers=[
            health,
            ready,
            signed_log,
            *ACCOUNTS,
            *OPENAPI,
            TaskController,
            RunController,
            RunLogController,
            event_stream,
            CommandController,
            RepositoryController,
            EnvironmentController,
            AutomationController,
            StagedArtifactController,
            RunArtifactController,
            upload,
            download,
        ],
        state=State(
            {
                "settings": settings,
                "database": database,
                "new_tasks": Inserts(database),
                "agents": frozenset(adapters(settings)),
            }
        ),
        lifespan=[lifespan],
        exception_handlers={
            TaskyardError: expected,
            HTTPException: framework,
            Exception: unexpected,
        },
        middleware=[idempotent],
        openapi_config=None,
        logging_config=None,
    )


@get("/health", media_type=MediaType.JSON, sync_to_thread=False)
def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@get("/ready")
async def ready(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The process can serve: the database answers."""
    await request.app.state.database.fetch_one("SELECT 1")
    return answer({"status": "ready"})


def expected(_: Request[Any, Any, Any], error: TaskyardError) -> Response[bytes]:
    return answer(error.envelope(), error.status, error.answer_headers())


def framework(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """The framework's own refusals, in the envelope of the contract."""
    if error.status_code == 404:
        return expected(request, NotFoundError())
    if error.status_code == 405:
        return expected(request, MethodNotAllowedError(f'Method "{request.method}" not allowed.'))
    if error.status_code >= 500:
        return unexpected(request, error)
    detail = error.detail
    if error.status_code == 413:
        handler = request.scope["route_handler"]
        limit = handler.resolve_request_max_body_size() if isinstance(handler, HTTPRouteHandler) else None
        size = f"{limit / 1_000_000:g} MB" if limit else "what is taken here"
        detail = (
            f"The request is larger than {size}. Send less at once; files go by artifacts/prepare_upload/."
        )
    kind = {"type": "invalid_request", "code": "invalid_input", "detail": detail, "attr": None}
    return answer(kind, error.status_code)


def unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """A bug, or a part that is down: the cause goes to the log, not to the client."""
    import psycopg

    if isinstance(error, psycopg.errors.DiskFull):
        log.error("the disk of the database is full", path=request.url.path, error=str(error).strip())
        return expected(
            request, ServiceUnavailableError("The disk of the database is full: nothing can be stored.")
        )
    if isinstance(error, psycopg.OperationalError):
        log.error("the database failed during a request", path=request.url.path, error=str(error).strip())
        return expected(
            request, ServiceUnavailableError("The database does not answer. Try again in a moment.")
        )
    if isinstance(error, RecursionError):
        # JSON that the parser could just follow, and something behind it could not.
        log.warning("a request was nested too deeply", path=request.url.path)
        return expected(
            request, InvalidInputError("JSON parse error - nested too deeply", code="parse_error")
        )
    log.error("request failed", method=request.method, path=request.url.path, exc_info=error)
    body = {"type": "server_error", "code": "error", "detail": "A server error occurred.", "attr": None}
    return answer(body, 500)


def heads_and_options(app: ASGIApp) -> ASGIApp:
    """HEAD is GET without the body, and OPTIONS answers 200 on every path (tasks-api §1.1).

    The answer to HEAD is over with its headers: the body of a stream may go on for as long as a run. Whoever makes
    one hears of it as of a client that has left.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        if method not in ("HEAD", "OPTIONS"):
            await app(scope, receive, send)
            return

        async def edit(message: Message) -> None:
            if message["type"] == "http.response.start" and method == "OPTIONS" and message["status"] == 204:
                message["status"] = 200
            if method == "HEAD" and message["type"] == "http.response.body":
                return
            await send(message)
            if method == "HEAD" and message["type"] == "http.response.start":
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        if method == "HEAD":
            scope = cast("Scope", {**scope, "method": "GET"})
        await app(scope, receive, edit)

    return wrapped


def until_the_stop(app: ASGIApp) -> ASGIApp:
    """A request that the stop of the server cuts short is answered 503, if its answer has not begun."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        begun = False

        async def watch(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await app(scope, receive, watch)
        except asyncio.CancelledError:  # nothing else cancels a request
            log.warning("the stop cut a request short", method=scope["method"], path=scope["path"])
            if not begun:
                error = ServiceUnavailableError("The server is stopping. Send the request again.")
                body = encode(error.envelope())
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"retry-after", b"5"),
                ]
                await send({"type": "http.response.start", "status": error.status, "headers": headers})
                await send({"type": "http.response.body", "body": body, "more_body": False})

    return wrapped
