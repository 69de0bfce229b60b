"""What `taskyard admin` does: make users, projects, memberships and keys. Each returns one JSON object."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from taskyard.accounts import store
from taskyard.db.engine import Connection, Database, Row
from taskyard.errors import InvalidInputError, NotFoundError
from taskyard.security import hash_api_key, mask_api_key, new_api_key

KNOWN_SCOPES = ("*", "task:read", "task:write")


async def create_user(database: Database, email: str) -> dict[str, Any]:
    """A new user; the very first one administers the site."""
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", email):
        raise InvalidInputError(f"{email!r} is not an e-mail address")
    async with database.transaction() as connection:
        first = not await store.has_users(connection)
        user = await store.insert_user(connection, email, email.partition("@")[0], is_staff=first)
    if user is None:
        raise InvalidInputError(f"there is a user {email} already")
    return {"id": user["id"], "uuid": str(user["uuid"]), "email": user["email"], "is_staff": user["is_staff"]}


async def create_project(database: Database, name: str) -> dict[str, Any]:
    if not name.strip():
        raise InvalidInputError("a project needs a name")
    async with database.transaction() as connection:
        organization = await store.default_organization(connection)
        project = await store.insert_project(connection, organization, name.strip())
    return {"id": project["id"], "name": project["name"], "organization": str(organization)}


async def add_member(database: Database, email: str, project_id: int, role: str = "member") -> dict[str, Any]:
    if role not in ("member", "admin"):
        raise InvalidInputError(f"{role!r} is not a role: member or admin")
    async with database.transaction() as connection:
        user = await _user(connection, email)
        if await store.project_by_id(connection, project_id) is None:
            raise NotFoundError(f"there is no project {project_id}")
        await store.insert_membership(connection, user["id"], project_id, role)
    return {"id": user["id"], "email": user["email"], "project_id": project_id, "role": role}


async def create_key(
    database: Database,
    email: str,
    scopes: Sequence[str],
    project_ids: Sequence[int] | None = None,
    label: str = "command line",
) -> dict[str, Any]:
    """A new key; its text is in the answer and nowhere else."""
    if not scopes:
        raise InvalidInputError(f"a key needs at least one scope: {', '.join(KNOWN_SCOPES)}")
    for scope in scopes:
        if scope not in KNOWN_SCOPES:
            raise InvalidInputError(f"{scope!r} is not a scope: {', '.join(KNOWN_SCOPES)}")
    key = new_api_key()
    async with database.transaction() as connection:
        user = await _user(connection, email)
        for project_id in project_ids or ():
            if await store.project_by_id(connection, project_id) is None:
                raise NotFoundError(f"there is no project {project_id}")
        key_id = await store.insert_key(
            connection,
            user["id"],
            label,
            hash_api_key(key),
            mask_api_key(key),
            list(scopes),
            list(project_ids) if project_ids else None,
        )
    return {"id": str(key_id), "key": key, "email": user["email"], "scopes": list(scopes)}


async def revoke_key(database: Database, key_id: str) -> dict[str, Any]:
    try:
        wanted = UUID(key_id)
    except ValueError:
        raise InvalidInputError(f"{key_id!r} is not the id of a key") from None
    async with database.transaction() as connection:
        row = await store.revoke_key(connection, wanted)
    if row is None:
        raise NotFoundError(f"there is no key {key_id}")
    return {"id": str(row["id"]), "revoked_at": row["revoked_at"].isoformat()}


async def bootstrap(database: Database) -> str | None:
    """On a new database: a first user, a first project and a key for them. The key, else None."""
    async with database.transaction() as connection:
        # Two API processes may start on one new database.
        await connection.execute("SELECT pg_advisory_xact_lock(7401824)")
        if await store.has_users(connection):
            return None
        user = await store.insert_user(connection, "admin@localhost", "Admin", is_staff=True)
        assert user is not None
        organization = await store.default_organization(connection)
        project = await store.insert_project(connection, organization, "Default project")
        await store.insert_membership(connection, user["id"], project["id"], "admin")
        key = new_api_key()
        await store.insert_key(
            connection, user["id"], "first key", hash_api_key(key), mask_api_key(key), ["*"], None
        )
    return key


async def _user(connection: Connection, email: str) -> Row:
    user = await store.user_by_email(connection, email)
    if user is None:
        raise NotFoundError(f"there is no user {email}")
    return user
