"""The description and the application have the same operations, with the same access."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from litestar.routes import HTTPRoute

from taskyard.accounts.caller import READ_METHODS, authenticate, authorize, signed_in
from taskyard.app import application
from taskyard.db.engine import Database
from taskyard.openapi.document import OPERATIONS
from taskyard.openapi.operation import Operation
from taskyard.settings import Settings

PAGES = {
    "GET /api/docs": "shows the description",
    "GET /api/docs/{}": "files of that page",
    "GET /login": "a page",
    "POST /login": "its form",
    "POST /logout": "a form",
    "GET /account": "a page",
    "POST /account/revoke": "its form",
    "GET /set-password": "a page",
    "POST /set-password": "its form",
    "GET /oauth/authorize": "a page",
    "POST /oauth/authorize": "its form",
}
"""For people in a browser: no part of the API."""

UNGUARDED = {"anybody", "signature", "run token"}


def key(method: str, path: str) -> str:
    """An operation, whatever its path parameters are called."""
    return f"{method} {re.sub(r'{[^}]+}', '{}', path).rstrip('/')}"


def served(settings: Settings, database: Database) -> Iterator[tuple[str, str | None]]:
    """Every operation of the application, and the access that its guard gives; None without a guard."""
    for route in application(settings, database).routes:
        assert isinstance(route, HTTPRoute)
        for handler in route.route_handlers:
            guards = handler.resolve_guards()
            for method in handler.http_methods - {"OPTIONS", "HEAD"}:
                access: str | None = None
                if authorize in guards:
                    access = handler.opt.get("scope") or (
                        "task:read" if method in READ_METHODS else "task:write"
                    )
                elif authenticate in guards:
                    access = handler.opt.get("scope") or "user"
                elif signed_in in guards:
                    access = "session"
                yield key(method, route.path), access


@pytest.fixture
def described() -> dict[str, Operation]:
    return {key(operation.method, operation.path): operation for operation in OPERATIONS}


def test_every_route_is_described_and_every_operation_exists(
    settings: Settings, database: Database, described: dict[str, Operation]
) -> None:
    routes = {name for name, _ in served(settings, database)}

    assert routes - described.keys() == PAGES.keys()
    assert described.keys() - routes == set()


def test_the_described_access_is_the_one_that_is_enforced(
    settings: Settings, database: Database, described: dict[str, Operation]
) -> None:
    for name, access in served(settings, database):
        if name in PAGES:
            continue
        said = described[name].access
        assert (None if said in UNGUARDED else said) == access, name
