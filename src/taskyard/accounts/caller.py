"""The caller of a request, and the one place where scopes are checked (tasks-api §1.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from taskyard.accounts import store
from taskyard.db.engine import Database
from taskyard.errors import (
    AuthenticationFailedError,
    NotAuthenticatedError,
    NotFoundError,
    PermissionDeniedError,
)
from taskyard.security import hash_api_key

READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


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
    key_id: UUID
    project: Project


def grants(scopes: frozenset[str], wanted: str) -> bool:
    """Whether scopes allow `wanted`: `*` grants everything, `:write` implies `:read`."""
    implied = wanted.removesuffix(":read") + ":write" if wanted.endswith(":read") else wanted
    return bool(scopes & {"*", wanted, implied})


async def authorize(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Guard of all project routes: credential, project, scope, in this order; sets `request.user`.

    A handler may name its scope in `opt["scope"]`; else the method decides.
    """
    database: Database = connection.app.state.database
    row = await store.find_key(database, hash_api_key(_credential(connection)), _project(connection))
    if row is None:
        raise AuthenticationFailedError
    if row["project_id"] is None:
        raise NotFoundError("Project not found.")
    limited = row["project_ids"] is not None and row["project_id"] not in row["project_ids"]
    if row["role"] is None or limited:
        raise PermissionDeniedError("You don't have access to the project.")
    caller = Caller(
        user_id=row["user_id"],
        email=row["email"],
        is_staff=row["is_staff"],
        scopes=frozenset(row["scopes"]),
        key_id=row["key_id"],
        project=Project(row["project_id"], row["project_name"], row["organization_id"]),
    )
    method = connection.scope.get("method", "GET")
    wanted = handler.opt.get("scope") or ("task:read" if method in READ_METHODS else "task:write")
    if not grants(caller.scopes, wanted):
        raise PermissionDeniedError(f"API key missing required scope '{wanted}'")
    if row["stale"]:
        await store.touch_key(database, caller.key_id)
    connection.scope["user"] = caller


def _credential(connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    header = connection.headers.get("authorization", "")
    kind, _, value = header.partition(" ")
    if not header:
        value = connection.query_params.get("personal_api_key", "")
    elif kind.lower() != "bearer":
        raise NotAuthenticatedError
    if not value.strip():
        raise NotAuthenticatedError
    return str(value).strip()


def _project(connection: ASGIConnection[Any, Any, Any, Any]) -> int | None:
    """The project's number in the path; None for `@current`."""
    text = str(connection.path_params["project_id"])
    if text == "@current":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise NotFoundError("Project not found.")
    return int(text)
