"""SQL of registered repositories: the names tasks use, and where each one lives."""

from __future__ import annotations

from taskyard.db.engine import Connection, Database


async def register(connection: Connection, project_id: int, name: str, origin: str, user_id: int) -> bool:
    """Remember a repository under a name; True when the name is new. An old name gets the new origin."""
    row = await (
        await connection.execute(
            "INSERT INTO repositories (project_id, name, origin, created_by_id)"
            " VALUES (%(project)s, %(name)s, %(origin)s, %(user)s)"
            " ON CONFLICT (project_id, name) DO UPDATE SET origin = excluded.origin, created_by_id = %(user)s"
            " RETURNING xmax = 0 AS new",
            {"project": project_id, "name": name, "origin": origin, "user": user_id},
        )
    ).fetchone()
    assert row is not None
    return bool(row["new"])


async def name_of(connection: Connection, project_id: int, origin: str) -> str | None:
    """The name under which an origin is registered."""
    row = await (
        await connection.execute(
            "SELECT name FROM repositories WHERE project_id = %(project)s AND origin = %(origin)s"
            " ORDER BY created_at LIMIT 1",
            {"project": project_id, "origin": origin},
        )
    ).fetchone()
    return None if row is None else str(row["name"])


async def origin_of(database: Database, project_id: int, name: str) -> str | None:
    row = await database.fetch_one(
        "SELECT origin FROM repositories WHERE project_id = %(project)s AND name = %(name)s",
        project=project_id,
        name=name,
    )
    return None if row is None else str(row["origin"])


async def taken(connection: Connection, project_id: int, name: str) -> bool:
    row = await (
        await connection.execute(
            "SELECT 1 FROM repositories WHERE project_id = %(project)s AND name = %(name)s",
            {"project": project_id, "name": name},
        )
    ).fetchone()
    return row is not None
