"""Who calls: the one place that knows credentials and checks scopes (tasks-api §1.3, §1.6).

Three credentials: a personal API key (`phx_…`), an OAuth access token (`pha_…`), the cookie of a signed-in
browser. Guards put the result into `request.user`: `authorize` a Caller (project routes), `authenticate` and
`signed_in` an Identity (routes outside of projects).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast
from uuid import UUID

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from taskyard.accounts import credentials_store as store
from taskyard.accounts.tokens import ACCESS_PREFIX, csrf_matches, token_hash
from taskyard.db.engine import Database, Row
from taskyard.errors import (
    AuthenticationFailedError,
    NotAuthenticatedError,
    NotFoundError,
    PermissionDeniedError,
    ThrottledError,
)
from taskyard.settings import RateLimitSettings

READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

SESSION_COOKIE = "taskyard_session"
CSRF_COOKIE = "taskyard_csrf"
CSRF_HEADER = "x-csrftoken"

Kind = Literal["key", "token", "session"]
AnyConnection = ASGIConnection[Any, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Project:
    id: int
    name: str
    organization_id: UUID


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated user acting in one project."""

    user_id: int
    email: str
    is_staff: bool
    scopes: frozenset[str]
    key_id: UUID | None
    """The API key; None for the other credentials."""
    project: Project
    role: str = "member"
    """In the project: `member` or `admin`."""
    sees_all: bool = True
    """Whether all tasks of the project are visible, or only those that `tasks.visibility` leaves (tasks-api §4.1)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated user, in no project."""

    user_id: int
    email: str
    kind: Kind
    credential_id: UUID | bytes
    """The API key, the OAuth grant, or the hash of the session."""
    project_id: int | None
    """What `@current` stands for."""
    project_ids: list[int] | None
    """The projects that the credential is limited to; None for all of the user's."""
    organization_ids: list[UUID] | None
    scopes: frozenset[str]


def grants(scopes: frozenset[str], wanted: str) -> bool:
    """Whether scopes allow `wanted`: `*` grants everything, `:write` implies `:read`."""
    implied = wanted.removesuffix(":read") + ":write" if wanted.endswith(":read") else wanted
    return bool(scopes & {"*", wanted, implied})


async def authorize(connection: AnyConnection, handler: BaseRouteHandler) -> None:
    """Guard of all project routes: credential, project, scope, in this order; sets `request.user`.

    A handler may name its scope in `opt["scope"]`; else the method decides.
    """
    if isinstance(connection.scope.get("user"), Caller):
        return  # whoever wrapped this request has asked already
    connection.scope["user"] = await _caller(connection, handler, project_in_path(connection), counted=True)


async def still_allowed(connection: AnyConnection) -> bool:
    """Whether `authorize` would let the caller in now, too: for answers that go on for long. It counts no request."""
    caller, handler = cast("Caller", connection.scope["user"]), connection.scope["route_handler"]
    try:
        await _caller(connection, handler, caller.project.id, counted=False)
    except (NotAuthenticatedError, PermissionDeniedError, NotFoundError):
        return False
    return True


async def _caller(
    connection: AnyConnection, handler: BaseRouteHandler, project_id: int | None, *, counted: bool
) -> Caller:
    kind, row = await _person(connection, project_id, counted=counted)
    if row["project_id"] is None:
        raise NotFoundError("Project not found.")
    if row["role"] is None or not _reaches(row):
        raise PermissionDeniedError("You don't have access to the project.")
    caller = Caller(
        user_id=row["user_id"],
        email=row["email"],
        is_staff=row["is_staff"],
        scopes=frozenset(row["scopes"]),
        key_id=row["credential_id"] if kind == "key" else None,
        project=Project(row["project_id"], row["project_name"], row["organization_id"]),
        role=row["role"],
        sees_all=connection.app.state.settings.tasks.visibility == "project",
    )
    method = connection.scope.get("method", "GET")
    wanted = handler.opt.get("scope") or ("task:read" if method in READ_METHODS else "task:write")
    _check_scope(caller.scopes, wanted)
    return caller


def _check_scope(scopes: frozenset[str], wanted: str) -> None:
    if not grants(scopes, wanted):
        raise PermissionDeniedError(f"API key missing required scope '{wanted}'")


async def authenticate(connection: AnyConnection, handler: BaseRouteHandler) -> None:
    """Guard of routes that any authenticated user may call, with the scope in `opt["scope"]` if there is one."""
    identity = await identify(connection)
    if (wanted := handler.opt.get("scope")) is not None:
        _check_scope(identity.scopes, wanted)
    connection.scope["user"] = identity


async def signed_in(connection: AnyConnection, _: BaseRouteHandler) -> None:
    """Guard of routes for people in a browser: no key or token may, say, make more keys."""
    identity = await identify(connection)
    if identity.kind != "session":
        raise PermissionDeniedError("This action does not support personal API key access.")
    connection.scope["user"] = identity


async def identify(connection: AnyConnection) -> Identity:
    """The user behind the request's credential. Raises NotAuthenticatedError and its kin."""
    kind, row = await _person(connection, None)
    current = row["project_id"] if row["role"] is not None and _reaches(row) else None
    return Identity(
        user_id=row["user_id"],
        email=row["email"],
        kind=kind,
        credential_id=row["credential_id"],
        project_id=current,
        project_ids=row["project_ids"],
        organization_ids=row["organization_ids"],
        scopes=frozenset(row["scopes"]),
    )


def _reaches(row: Row) -> bool:
    """Whether the credential's own limits let it into the row's project."""
    projects, organizations = row["project_ids"], row["organization_ids"]
    if projects is not None and row["project_id"] not in projects:
        return False
    return organizations is None or row["organization_id"] in organizations


async def _person(
    connection: AnyConnection, project_id: int | None, *, counted: bool = True
) -> tuple[Kind, Row]:
    """The credential's kind, and the row of its user and project. `counted` by the limits of keys."""
    database: Database = connection.app.state.database
    text = _bearer(connection)
    if text is None:
        return "session", await _session(connection, database, project_id)
    if text.startswith(ACCESS_PREFIX):
        row = await store.find_token(database, token_hash(text), project_id)
        if row is None:
            raise AuthenticationFailedError("Invalid access token: unknown, expired or revoked.")
        if row["stale"]:
            await store.touch_grant(database, row["credential_id"])
        return "token", row
    limits = connection.app.state.settings.rate_limits if counted else None
    return "key", await _key(database, limits, text, project_id)


async def _key(
    database: Database, limits: RateLimitSettings | None, text: str, project_id: int | None
) -> Row:
    if limits is not None and limits.enabled:
        allowed = limits.per_minute, limits.per_hour
        row = await store.count_key(database, token_hash(text), project_id, *allowed)
        if row is not None and row["counted"] is None:
            raise ThrottledError(await store.seconds_to_wait(database, row["credential_id"], *allowed))
    else:
        row = await store.find_key(database, token_hash(text), project_id)
    if row is None:
        raise AuthenticationFailedError
    if row["stale"]:
        await store.touch_key(database, row["credential_id"])
    return row


async def _session(connection: AnyConnection, database: Database, project_id: int | None) -> Row:
    session = connection.cookies.get(SESSION_COOKIE)
    if not session:
        raise NotAuthenticatedError
    idle_s = connection.app.state.settings.sessions.idle_s
    row = await store.find_session(database, token_hash(session), project_id, idle_s)
    if row is None:
        raise AuthenticationFailedError("Your session has ended. Sign in again.")
    if connection.scope.get("method") not in READ_METHODS and not csrf_matches(
        session, connection.headers.get(CSRF_HEADER, "")
    ):
        raise PermissionDeniedError("CSRF Failed: CSRF token missing or incorrect.")
    if row["stale"]:
        await store.touch_session(database, row["credential_id"])
    return row


def _bearer(connection: AnyConnection) -> str | None:
    """The key or token of the request; None when only a cookie is left."""
    header = connection.headers.get("authorization", "")
    if not header:
        return cast("str", connection.query_params.get("personal_api_key", "")).strip() or None
    kind, _, value = header.partition(" ")
    if kind.lower() != "bearer" or not value.strip():
        raise NotAuthenticatedError
    return value.strip()


def project_in_path(connection: AnyConnection) -> int | None:
    """The project's number in the path; None for `@current`."""
    text = str(connection.path_params["project_id"])
    if text == "@current":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise NotFoundError("Project not found.")
    return int(text)
