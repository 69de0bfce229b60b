"""SQL of users, projects, memberships and keys."""

from __future__ import annotations

from datetime import datetime
from typing import LiteralString
from uuid import UUID

from taskyard.db.engine import Connection, Row


async def one(connection: Connection, query: LiteralString, **params: object) -> Row | None:
    return await (await connection.execute(query, params)).fetchone()


async def user_by_email(connection: Connection, email: str) -> Row | None:
    return await one(connection, "SELECT * FROM users WHERE lower(email) = lower(%(email)s)", email=email)


async def insert_user(connection: Connection, email: str, first_name: str, *, is_staff: bool) -> Row | None:
    """The new user; None when the address is taken."""
    return await one(
        connection,
        "INSERT INTO users (email, first_name, is_staff) VALUES (%(email)s, %(name)s, %(staff)s)"
        " ON CONFLICT DO NOTHING RETURNING *",
        email=email,
        name=first_name,
        staff=is_staff,
    )


async def has_users(connection: Connection) -> bool:
    return await one(connection, "SELECT 1 FROM users LIMIT 1") is not None


async def default_organization(connection: Connection) -> UUID:
    """The site's organization, made when it is missing."""
    row = await one(connection, "SELECT id FROM organizations ORDER BY created_at LIMIT 1")
    if row is None:
        row = await one(connection, "INSERT INTO organizations (name) VALUES ('Taskyard') RETURNING id")
    assert row is not None
    return UUID(str(row["id"]))


async def insert_project(connection: Connection, organization_id: UUID, name: str) -> Row:
    row = await one(
        connection,
        "INSERT INTO projects (organization_id, name) VALUES (%(organization)s, %(name)s) RETURNING *",
        organization=organization_id,
        name=name,
    )
    assert row is not None
    return row


async def project_by_id(connection: Connection, project_id: int) -> Row | None:
    return await one(connection, "SELECT * FROM projects WHERE id = %(id)s", id=project_id)


async def insert_membership(connection: Connection, user_id: int, project_id: int, role: str) -> None:
    """Join a project; the first one joined becomes the user's current project."""
    await connection.execute(
        "INSERT INTO memberships (user_id, project_id, role) VALUES (%(user)s, %(project)s, %(role)s)"
        " ON CONFLICT (user_id, project_id) DO UPDATE SET role = excluded.role, updated_at = clock_timestamp()",
        {"user": user_id, "project": project_id, "role": role},
    )
    await connection.execute(
        "UPDATE users SET current_project_id = coalesce(current_project_id, %(project)s) WHERE id = %(user)s",
        {"user": user_id, "project": project_id},
    )


async def insert_key(
    connection: Connection,
    user_id: int,
    label: str,
    key_hash: bytes,
    mask: str,
    scopes: list[str],
    project_ids: list[int] | None,
    organization_ids: list[UUID] | None = None,
    expires_at: datetime | None = None,
) -> UUID:
    # A project that is named twice is still the only one, which `@current` stands for.
    once = [None if ids is None else list(dict.fromkeys(ids)) for ids in (project_ids, organization_ids)]
    row = await one(
        connection,
        "INSERT INTO api_keys"
        " (user_id, label, hash, mask, scopes, project_ids, organization_ids, expires_at) VALUES (%(user)s,"
        " %(label)s, %(hash)s, %(mask)s, %(scopes)s, %(projects)s, %(organizations)s, %(expires)s) RETURNING id",
        user=user_id,
        label=label,
        hash=key_hash,
        mask=mask,
        scopes=list(dict.fromkeys(scopes)),
        projects=once[0],
        organizations=once[1],
        expires=expires_at,
    )
    assert row is not None
    return UUID(str(row["id"]))


async def revoke_key(connection: Connection, key_id: UUID, user_id: int | None = None) -> Row | None:
    """The revoked key; None when there is no such key (of the user). Revoking twice is the same as once."""
    return await one(
        connection,
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, clock_timestamp())"
        " WHERE id = %(id)s AND (%(user)s::integer IS NULL OR user_id = %(user)s)"
        " RETURNING id, label, revoked_at",
        id=key_id,
        user=user_id,
    )


async def set_password(connection: Connection, user_id: int, password_hash: str) -> None:
    await connection.execute(
        "UPDATE users SET password_hash = %(hash)s WHERE id = %(user)s",
        {"user": user_id, "hash": password_hash},
    )


async def lock_password(connection: Connection, user_id: int) -> str | None:
    """The hash of a user's password, which nobody replaces until the transaction ends."""
    row = await one(
        connection, "SELECT password_hash FROM users WHERE id = %(id)s FOR NO KEY UPDATE", id=user_id
    )
    return None if row is None else row["password_hash"]


# --- what a user sees of the directory ---------------------------------------------------------------

VISIBLE: LiteralString = """
FROM projects p
JOIN memberships m ON m.project_id = p.id AND m.user_id = %(user)s
JOIN organizations o ON o.id = p.organization_id
WHERE (%(projects)s::integer[] IS NULL OR p.id = ANY(%(projects)s))
    AND (%(organizations)s::uuid[] IS NULL OR p.organization_id = ANY(%(organizations)s))
"""
"""Projects of a user, as far as the credential reaches: the one place that scopes the directory."""


async def user_by_id(connection: Connection, user_id: int) -> Row:
    row = await one(connection, "SELECT * FROM users WHERE id = %(id)s", id=user_id)
    assert row is not None  # users are never deleted
    return row


async def visible_projects(
    connection: Connection, user_id: int, project_ids: list[int] | None, organization_ids: list[UUID] | None
) -> list[Row]:
    """Every project that a credential reaches, with its organization and the user's role, by number."""
    query: LiteralString = (
        "SELECT p.id, p.uuid, p.name, p.organization_id, p.created_at, m.role,"
        " o.name AS organization_name, o.created_at AS organization_created_at" + VISIBLE + " ORDER BY p.id"
    )
    params = {"user": user_id, "projects": project_ids, "organizations": organization_ids}
    return await (await connection.execute(query, params)).fetchall()


async def update_user(connection: Connection, user_id: int, first_name: str, last_name: str) -> None:
    await connection.execute(
        "UPDATE users SET first_name = %(first)s, last_name = %(last)s WHERE id = %(id)s",
        {"id": user_id, "first": first_name, "last": last_name},
    )


async def set_current_project(connection: Connection, user_id: int, project_id: int) -> None:
    """What `@current` stands for from now on, where no credential says otherwise."""
    await connection.execute(
        "UPDATE users SET current_project_id = %(project)s WHERE id = %(id)s",
        {"id": user_id, "project": project_id},
    )


async def users(connection: Connection) -> list[Row]:
    """All users with the names of their projects."""
    query: LiteralString = (
        "SELECT u.id, u.email, u.is_staff, u.password_hash IS NOT NULL AS has_password, u.created_at,"
        " coalesce(array_agg(p.name ORDER BY p.id) FILTER (WHERE p.id IS NOT NULL), '{}') AS projects"
        " FROM users u LEFT JOIN memberships m ON m.user_id = u.id LEFT JOIN projects p ON p.id = m.project_id"
        " GROUP BY u.id ORDER BY u.id"
    )
    return await (await connection.execute(query)).fetchall()


KEY: LiteralString = (
    "SELECT k.id, k.user_id, u.email, k.label, k.mask, k.scopes, k.project_ids, k.organization_ids,"
    " k.created_at, k.expires_at, k.last_used_at FROM api_keys k JOIN users u ON u.id = k.user_id"
    " WHERE k.revoked_at IS NULL"
)


async def living_keys(connection: Connection, user_id: int | None = None) -> list[Row]:
    """Keys that were not revoked, of one user or of all, oldest first."""
    query: LiteralString = (
        KEY + " AND (%(user)s::integer IS NULL OR k.user_id = %(user)s) ORDER BY k.created_at, k.id"
    )
    return await (await connection.execute(query, {"user": user_id})).fetchall()


async def living_key(connection: Connection, user_id: int, key_id: UUID) -> Row | None:
    return await one(
        connection, KEY + " AND k.user_id = %(user)s AND k.id = %(key)s", user=user_id, key=key_id
    )
