"""SQL of who belongs to a project."""

from __future__ import annotations

from typing import LiteralString
from uuid import UUID

from taskyard.accounts.store import VISIBLE, one
from taskyard.db.engine import Connection, Row

COLUMNS: LiteralString = (
    "SELECT u.id AS user_id, u.uuid AS user_uuid, u.distinct_id, u.first_name, u.last_name, u.email,"
)
MEMBER: LiteralString = (
    COLUMNS + " m.role, m.joined_at, m.updated_at FROM memberships m JOIN users u ON u.id = m.user_id"
    " WHERE m.project_id = %(project)s"
)


async def page(connection: Connection, project_id: int, limit: int, offset: int) -> tuple[list[Row], int]:
    """One page of a project's members by when they joined, and their count."""
    params = {"project": project_id, "limit": limit, "offset": offset}
    query: LiteralString = MEMBER + " ORDER BY m.joined_at, u.id LIMIT %(limit)s OFFSET %(offset)s"
    rows = await (await connection.execute(query, params)).fetchall()
    count = await one(
        connection, "SELECT count(*) AS n FROM memberships WHERE project_id = %(project)s", project=project_id
    )
    assert count is not None
    return rows, count["n"]


async def of_organization(
    connection: Connection,
    user_id: int,
    project_ids: list[int] | None,
    organization_ids: list[UUID] | None,
    organization_id: UUID,
) -> list[Row]:
    """The members of those projects of an organization that a credential reaches; each once, with the highest role."""
    query: LiteralString = (
        COLUMNS
        + " min(o.role) AS role, min(o.joined_at) AS joined_at, max(o.updated_at) AS updated_at"  # admin < member
        " FROM memberships o JOIN users u ON u.id = o.user_id WHERE o.project_id IN (SELECT p.id"
        + VISIBLE
        + " AND p.organization_id = %(organization)s) GROUP BY u.id ORDER BY 8, u.id"
    )
    params = {
        "user": user_id,
        "projects": project_ids,
        "organizations": organization_ids,
        "organization": organization_id,
    }
    return await (await connection.execute(query, params)).fetchall()


async def get(connection: Connection, project_id: int, user_uuid: UUID) -> Row | None:
    return await one(connection, MEMBER + " AND u.uuid = %(uuid)s", project=project_id, uuid=user_uuid)


async def lock(connection: Connection, project_id: int) -> list[Row]:
    """All memberships of a project (`user_id`, `role`), locked: whoever removes its last admin is alone with it."""
    query: LiteralString = (
        "SELECT user_id, role FROM memberships WHERE project_id = %(project)s ORDER BY user_id FOR UPDATE"
    )
    return await (await connection.execute(query, {"project": project_id})).fetchall()


async def remove(connection: Connection, project_id: int, user_id: int) -> bool:
    """Leave a project; another one of the user's becomes the current one. False when they were no member."""
    params = {"project": project_id, "user": user_id}
    row = await one(
        connection,
        "DELETE FROM memberships WHERE project_id = %(project)s AND user_id = %(user)s RETURNING 1",
        **params,
    )
    await connection.execute(
        "UPDATE users SET current_project_id ="
        " (SELECT min(m.project_id) FROM memberships m WHERE m.user_id = %(user)s)"
        " WHERE id = %(user)s AND current_project_id = %(project)s",
        params,
    )
    return row is not None
