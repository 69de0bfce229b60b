"""SQL of sandbox environments, and of the mark of the key that encrypts their variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, LiteralString
from uuid import UUID

from psycopg import sql

from taskyard.db.engine import Connection, Database, Row, fetch_one

READABLE: LiteralString = (
    "e.project_id = %(project)s AND (NOT e.private OR e.created_by_id = %(user)s)"  # null matches nobody
)
"""The one place that scopes environments: the project's public ones, and the user's own."""

SELECT: LiteralString = """
SELECT e.id, e.project_id, e.name, e.network_access_level, e.allowed_domains, e.include_default_domains,
    e.repositories, e.setup_script, e.mcp_servers, e.worker_pool, e.image, e.variables IS NOT NULL AS has_variables,
    e.private, e.internal, e.created_at, e.updated_at,
    u.id AS user_id, u.uuid AS user_uuid, u.distinct_id, u.first_name, u.last_name, u.email
FROM sandbox_environments e LEFT JOIN users u ON u.id = e.created_by_id
"""
"""Everything but the variables."""

COLUMNS = {
    "name": "name",
    "network_access_level": "network_access_level",
    "allowed_domains": "allowed_domains",
    "include_default_domains": "include_default_domains",
    "repositories": "repositories",
    "private": "private",
    "setup_script": "setup_script",
    "mcp_servers": "mcp_servers",
    "worker_pool": "worker_pool",
    "image": "image",
    "variables": "variables",
}


async def get(
    source: Database | Connection, project_id: int, user_id: int | None, environment_id: UUID
) -> Row | None:
    """An environment that a user may see; None otherwise."""
    query: LiteralString = SELECT + " WHERE e.id = %(id)s AND " + READABLE
    return await fetch_one(source, query, id=environment_id, project=project_id, user=user_id)


async def named(database: Database, word: str) -> list[Row]:
    """All environments of the site with this id or name, whoever may see them: for who runs the server."""
    query: LiteralString = (
        SELECT + " WHERE e.id::text = lower(%(word)s) OR e.name = %(word)s ORDER BY e.project_id, e.id"
    )
    return await database.fetch(query, word=word)


async def page(
    database: Database, project_id: int, user_id: int, limit: int, offset: int
) -> tuple[list[Row], int]:
    """One page of the list, newest first, and the whole count."""
    scope = {"project": project_id, "user": user_id}
    rows = await database.fetch(
        SELECT
        + " WHERE NOT e.internal AND "
        + READABLE
        + " ORDER BY e.created_at DESC, e.id DESC LIMIT %(limit)s OFFSET %(offset)s",
        **scope,
        limit=limit,
        offset=offset,
    )
    count = await database.fetch_one(
        "SELECT count(*) AS n FROM sandbox_environments e WHERE NOT e.internal AND " + READABLE, **scope
    )
    assert count is not None
    return rows, count["n"]


async def insert(connection: Connection, project_id: int, user_id: int, fields: Mapping[str, Any]) -> UUID:
    row = await (
        await connection.execute(
            "INSERT INTO sandbox_environments (project_id, created_by_id, name, network_access_level,"
            " allowed_domains, include_default_domains, repositories, private, setup_script, mcp_servers,"
            " worker_pool, image, variables)"
            " VALUES (%(project)s, %(user)s, %(name)s, %(network_access_level)s, %(allowed_domains)s,"
            " %(include_default_domains)s, %(repositories)s, %(private)s, %(setup_script)s,"
            " %(mcp_servers)s, %(worker_pool)s, %(image)s, %(variables)s)"
            " RETURNING id",
            {**fields, "project": project_id, "user": user_id},
        )
    ).fetchone()
    assert row is not None
    return UUID(str(row["id"]))


async def update(
    connection: Connection, project_id: int, user_id: int, environment_id: UUID, changes: Mapping[str, Any]
) -> bool:
    """Write the changed fields; `updated_at` always moves. False when there is no such environment."""
    params: dict[str, Any] = {"project": project_id, "user": user_id, "id": environment_id}
    parts: list[sql.Composable] = [
        sql.SQL("updated_at = greatest(clock_timestamp(), e.updated_at + interval '1 microsecond')")
    ]
    for name, value in changes.items():
        parts.append(sql.SQL("{} = {}").format(sql.Identifier(COLUMNS[name]), sql.Placeholder(name)))
        params[name] = value
    query = sql.SQL("UPDATE sandbox_environments e SET {} WHERE e.id = %(id)s AND {} RETURNING e.id").format(
        sql.SQL(", ").join(parts), sql.SQL(READABLE)
    )
    return await (await connection.execute(query, params)).fetchone() is not None


async def delete(connection: Connection, project_id: int, user_id: int, environment_id: UUID) -> bool:
    query: LiteralString = (
        "DELETE FROM sandbox_environments e WHERE e.id = %(id)s AND " + READABLE + " RETURNING e.id"
    )
    params = {"project": project_id, "user": user_id, "id": environment_id}
    return await (await connection.execute(query, params)).fetchone() is not None


# --- secrets -------------------------------------------------------------------------------------------


async def variables(database: Database, environment_id: UUID) -> bytes | None:
    """The encrypted variables; None when there are none. Whoever calls has checked who may use them."""
    row = await database.fetch_one(
        "SELECT variables FROM sandbox_environments WHERE id = %(id)s", id=environment_id
    )
    return None if row is None or row["variables"] is None else bytes(row["variables"])


@dataclass(frozen=True, slots=True)
class Place:
    """A column of encrypted texts, and how each of them is encrypted anew or given up."""

    what: str
    """For people; the row's id follows."""
    lock: LiteralString
    write: LiteralString
    drop: LiteralString


PLACES = (
    Place(
        "variables of sandbox environment",
        "SELECT id, variables AS sealed FROM sandbox_environments WHERE variables IS NOT NULL FOR UPDATE",
        # Nothing that a client sees changes, so `updated_at` stays.
        "UPDATE sandbox_environments SET variables = %(sealed)s WHERE id = %(id)s",
        "UPDATE sandbox_environments SET variables = NULL,"
        " updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond') WHERE id = %(id)s",
    ),
    Place(
        "user token of run",
        "SELECT run_id AS id, token AS sealed FROM run_user_tokens FOR UPDATE",
        "UPDATE run_user_tokens SET token = %(sealed)s WHERE run_id = %(id)s",
        "DELETE FROM run_user_tokens WHERE run_id = %(id)s",
    ),
)
"""Everything that is encrypted in the database."""


async def lock_sealed(connection: Connection, place: Place) -> list[Row]:
    """`id` and `sealed` of all texts of a place, locked until the transaction ends."""
    return await (await connection.execute(place.lock)).fetchall()


async def reseal(connection: Connection, place: Place, row_id: UUID, sealed: bytes) -> None:
    await connection.execute(place.write, {"id": row_id, "sealed": sealed})


async def drop_sealed(connection: Connection, place: Place, row_id: UUID) -> None:
    await connection.execute(place.drop, {"id": row_id})


MARK: LiteralString = "SELECT fingerprint FROM secret_key"
LOCKED: Mapping[str, LiteralString] = {"": MARK, "share": MARK + " FOR SHARE", "update": MARK + " FOR UPDATE"}


async def key_mark(connection: Connection, lock: Literal["", "share", "update"]) -> str | None:
    """The fingerprint of the key in use, None before the first; locked until the transaction ends."""
    row = await (await connection.execute(LOCKED[lock])).fetchone()
    assert row is not None
    return None if row["fingerprint"] is None else str(row["fingerprint"])


async def set_key_mark(connection: Connection, fingerprint: str) -> None:
    await connection.execute(
        "UPDATE secret_key SET fingerprint = %(fingerprint)s", {"fingerprint": fingerprint}
    )
