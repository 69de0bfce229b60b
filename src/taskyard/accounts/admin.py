"""What `taskyard admin` does: make users, projects, memberships and keys. Each returns one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from taskyard.accounts import members_store, passwords, present, sign_in, store
from taskyard.accounts.schemas import SCOPES, is_email
from taskyard.db.engine import Connection, Database, Row
from taskyard.errors import InvalidInputError, NotFoundError
from taskyard.schemas import check_storable
from taskyard.security import hash_api_key, mask_api_key, new_api_key


async def create_user(database: Database, email: str) -> dict[str, Any]:
    """A new user; the very first one administers the site."""
    check_storable(email)
    if not is_email(email):
        raise InvalidInputError(f"{email!r} is not an e-mail address")
    async with database.transaction() as connection:
        first = not await store.has_users(connection)
        user = await store.insert_user(connection, email, email.partition("@")[0], is_staff=first)
    if user is None:
        raise InvalidInputError(f"there is a user {email} already")
    return {"id": user["id"], "uuid": str(user["uuid"]), "email": user["email"], "is_staff": user["is_staff"]}


async def create_project(database: Database, name: str) -> dict[str, Any]:
    check_storable(name)
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


async def remove_member(database: Database, email: str, project_id: int) -> dict[str, Any]:
    """Take a user out of a project, be it its last admin: whoever runs the server can make another."""
    async with database.transaction() as connection:
        user = await _user(connection, email)
        if not await members_store.remove(connection, project_id, user["id"]):
            raise NotFoundError(f"{email} is not a member of project {project_id}")
    return {"id": user["id"], "email": user["email"], "project_id": project_id}


async def create_key(
    database: Database,
    email: str,
    scopes: Sequence[str],
    project_ids: Sequence[int] | None = None,
    label: str = "command line",
) -> dict[str, Any]:
    """A new key; its text is in the answer and nowhere else."""
    if not scopes:
        raise InvalidInputError(f"a key needs at least one scope: {', '.join(SCOPES)}")
    for scope in scopes:
        if scope not in SCOPES:
            raise InvalidInputError(f"{scope!r} is not a scope: {', '.join(SCOPES)}")
    check_storable(label)
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


async def set_password(database: Database, email: str, password: str) -> dict[str, Any]:
    """Set a user's password; whoever was signed in as them is signed out."""
    passwords.check(password)
    hashed = await passwords.hash_password(password)
    async with database.transaction() as connection:
        user = await _user(connection, email)
        await sign_in.replace_password(connection, user["id"], hashed)
    return {"id": user["id"], "email": user["email"]}


async def password_link(database: Database, email: str) -> dict[str, Any]:
    """A path of the server where this user can set a password, once, within a day."""
    async with database.transaction() as connection:
        user = await _user(connection, email)
        token = await sign_in.new_link(connection, user["id"])
    return {"id": user["id"], "email": user["email"], "path": sign_in.link_path(token)}


async def list_users(database: Database) -> list[dict[str, Any]]:
    async with database.connection() as connection:
        rows = await store.users(connection)
    return [
        {
            "id": row["id"],
            "email": row["email"],
            "is_staff": row["is_staff"],
            "has_password": row["has_password"],
            "projects": row["projects"],
        }
        for row in rows
    ]


async def list_keys(database: Database, email: str | None = None) -> list[dict[str, Any]]:
    """Keys that were not revoked, of one user or of all."""
    async with database.connection() as connection:
        user = None if email is None else await _user(connection, email)
        rows = await store.living_keys(connection, None if user is None else user["id"])
    return [{"email": row["email"], **present.api_key(row)} for row in rows]


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


@dataclass(frozen=True, slots=True)
class First:
    """What the first user of a new site gets; shown once."""

    key: str
    link: str
    """The path where a password can be set, once, within a day."""


async def bootstrap(database: Database) -> First | None:
    """On a new database: a first user without a password, a first project, a key and a link. Else None."""
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
        return First(key, sign_in.link_path(await sign_in.new_link(connection, user["id"])))


async def _user(connection: Connection, email: str) -> Row:
    check_storable(email)
    user = await store.user_by_email(connection, email)
    if user is None:
        raise NotFoundError(f"there is no user {email}")
    return user
