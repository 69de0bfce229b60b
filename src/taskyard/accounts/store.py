"""SQL of users, projects, memberships and keys."""

from __future__ import annotations

from typing import LiteralString
from uuid import UUID

from taskyard.db.engine import Connection, Database, Row


async def find_key(database: Database, key_hash: bytes, project_id: int | None) -> Row | None:
    """The living key with its user, the asked project (or the user's current one) and the user's role there."""
    return await database.fetch_one(
        "SELECT k.id AS key_id, k.scopes, k.project_ids, u.id AS user_id, u.email, u.is_staff,"
        " p.id AS project_id, p.name AS project_name, p.organization_id, m.role,"
        " (k.last_used_at IS NULL OR k.last_used_at < clock_timestamp() - interval '1 minute') AS stale"
        " FROM api_keys k JOIN users u ON u.id = k.user_id"
        " LEFT JOIN projects p ON p.id = coalesce(%(project)s, u.current_project_id)"
        " LEFT JOIN memberships m ON m.project_id = p.id AND m.user_id = u.id"
        " WHERE k.hash = %(hash)s AND k.revoked_at IS NULL"
        " AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())",
        hash=key_hash,
        project=project_id,
    )


async def touch_key(database: Database, key_id: UUID) -> None:
    await database.execute(
        "UPDATE api_keys SET last_used_at = clock_timestamp() WHERE id = %(id)s", id=key_id
    )


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
        " ON CONFLICT (user_id, project_id) DO UPDATE SET role = excluded.role",
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
) -> UUID:
    row = await one(
        connection,
        "INSERT INTO api_keys (user_id, label, hash, mask, scopes, project_ids)"
        " VALUES (%(user)s, %(label)s, %(hash)s, %(mask)s, %(scopes)s, %(projects)s) RETURNING id",
        user=user_id,
        label=label,
        hash=key_hash,
        mask=mask,
        scopes=scopes,
        projects=project_ids,
    )
    assert row is not None
    return UUID(str(row["id"]))


async def revoke_key(connection: Connection, key_id: UUID) -> Row | None:
    """The revoked key; None when there is no such key. Revoking twice is the same as once."""
    return await one(
        connection,
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, clock_timestamp())"
        " WHERE id = %(id)s RETURNING id, label, revoked_at",
        id=key_id,
    )
