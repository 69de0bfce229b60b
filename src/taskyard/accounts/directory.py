"""Rules of the directory: what a credential shows of users, projects and organizations, and personal API keys."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from taskyard.accounts import present, store
from taskyard.accounts.caller import Caller, Identity
from taskyard.accounts.schemas import SCOPES, KeyWrite, UserUpdate
from taskyard.db.engine import Connection, Row
from taskyard.errors import InvalidInputError, NotFoundError
from taskyard.security import hash_api_key, mask_api_key, new_api_key


async def me(connection: Connection, identity: Identity) -> dict[str, Any]:
    user = await store.user_by_id(connection, identity.user_id)
    return present.me(user, await projects(connection, identity), identity.project_id)


async def update_me(connection: Connection, identity: Identity, body: UserUpdate) -> dict[str, Any]:
    """Change one's name, or what `@current` stands for: a project that the credential reaches."""
    sent = body.sent()
    if {"first_name", "last_name"} & sent.keys():
        user = await store.user_by_id(connection, identity.user_id)
        names = {name: str(sent.get(name, user[name])) for name in ("first_name", "last_name")}
        await store.update_user(connection, identity.user_id, **names)
    for name, column in (("set_current_organization", "organization_id"), ("set_current_team", "id")):
        if (wanted := sent.get(name)) is None:
            continue
        reached = [row["id"] for row in await projects(connection, identity) if row[column] == wanted]
        if not reached:
            detail = f'Invalid pk "{wanted}" - object does not exist.'
            raise InvalidInputError(detail, code="does_not_exist", attr=name)
        # Nothing to do when the current project is in the organization already.
        if identity.project_id not in reached:
            await store.set_current_project(connection, identity.user_id, reached[0])
            identity = replace(identity, project_id=reached[0])
    return await me(connection, identity)


async def projects(connection: Connection, identity: Identity) -> list[Row]:
    """The projects that the credential reaches."""
    return await store.visible_projects(
        connection, identity.user_id, identity.project_ids, identity.organization_ids
    )


async def project(connection: Connection, caller: Caller) -> Row:
    """The caller's project, as `projects` has it."""
    rows = await store.visible_projects(connection, caller.user_id, [caller.project.id], None)
    if not rows:
        raise NotFoundError
    return rows[0]


async def organization(connection: Connection, identity: Identity, wanted: str) -> dict[str, Any]:
    """One organization by its id or `@current`, or NotFoundError."""
    rows = await projects(connection, identity)
    if wanted == "@current":
        current = next((row for row in rows if row["id"] == identity.project_id), None)
        wanted = "" if current is None else str(current["organization_id"])
    for entry in present.organizations(rows):
        if entry["id"] == wanted.lower():
            return entry
    raise NotFoundError


async def current_key(connection: Connection, identity: Identity) -> dict[str, Any]:
    """The key of this very request."""
    row = None
    if isinstance(identity.credential_id, UUID):
        row = await store.living_key(connection, identity.user_id, identity.credential_id)
    if row is None:
        raise NotFoundError("This request was not made with a personal API key.")
    return present.api_key(row)


async def create_key(connection: Connection, identity: Identity, body: KeyWrite) -> dict[str, Any]:
    """A new key of the caller; the answer is the only place that has its text."""
    for scope in body.scopes:
        if scope not in SCOPES:
            raise InvalidInputError(f"Invalid scope: {scope}", attr="scopes")
    mine = await projects(connection, identity)
    if not {row["id"] for row in mine} >= set(body.scoped_teams or ()):
        raise InvalidInputError(
            "You must be a member of all projects that you are scoping the key to.", attr="scoped_teams"
        )
    if not {row["organization_id"] for row in mine} >= set(body.scoped_organizations or ()):
        raise InvalidInputError(
            "You must be a member of all organizations that you are scoping the key to.",
            attr="scoped_organizations",
        )
    if body.expires_at is not None and body.expires_at <= datetime.now(UTC):
        raise InvalidInputError("This time has passed already.", attr="expires_at")
    key = new_api_key()
    key_id = await store.insert_key(
        connection,
        identity.user_id,
        body.label,
        hash_api_key(key),
        mask_api_key(key),
        body.scopes,
        body.scoped_teams or None,
        body.scoped_organizations or None,
        body.expires_at,
    )
    row = await store.living_key(connection, identity.user_id, key_id)
    assert row is not None
    return present.api_key(row, key)


async def key(connection: Connection, identity: Identity, key_id: UUID) -> dict[str, Any]:
    row = await store.living_key(connection, identity.user_id, key_id)
    if row is None:
        raise NotFoundError
    return present.api_key(row)


async def keys(connection: Connection, identity: Identity) -> list[dict[str, Any]]:
    return [present.api_key(row) for row in await store.living_keys(connection, identity.user_id)]


async def revoke_key(connection: Connection, identity: Identity, key_id: UUID) -> None:
    if await store.living_key(connection, identity.user_id, key_id) is None:
        raise NotFoundError
    await store.revoke_key(connection, key_id, identity.user_id)
