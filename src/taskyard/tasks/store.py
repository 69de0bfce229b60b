"""SQL of tasks. Every read goes through `READABLE`, the one place that scopes tasks to a project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, LiteralString
from uuid import UUID

from psycopg import sql
from psycopg.types.json import Jsonb

from taskyard.db.engine import Connection, Database, Row

READABLE: LiteralString = "t.project_id = %(project)s AND t.deleted_at IS NULL"

SELECT: LiteralString = """
SELECT t.*, p.name AS project_name,
    u.id AS user_id, u.uuid AS user_uuid, u.distinct_id, u.first_name, u.last_name, u.email,
    r.run
FROM tasks t
JOIN projects p ON p.id = t.project_id
LEFT JOIN users u ON u.id = t.created_by_id
LEFT JOIN LATERAL (
    SELECT to_jsonb(latest) AS run FROM runs latest
    WHERE latest.task_id = t.id ORDER BY latest.created_at DESC, latest.id DESC LIMIT 1
) r ON true
"""


async def get(source: Database | Connection, project_id: int, task_id: UUID) -> Row | None:
    """A task with its creator and newest run; None when the project has no such task."""
    query: LiteralString = SELECT + " WHERE t.id = %(task)s AND " + READABLE
    params = {"project": project_id, "task": task_id}
    if isinstance(source, Database):
        return await source.fetch_one(query, **params)
    return await (await source.execute(query, params)).fetchone()


async def page(database: Database, project_id: int, limit: int, offset: int) -> tuple[list[Row], int]:
    """One page of the plain list, newest first, and the whole count."""
    async with database.connection() as connection:
        rows = await (
            await connection.execute(
                SELECT
                + " WHERE NOT t.internal AND "
                + READABLE
                + " ORDER BY t.created_at DESC, t.id DESC LIMIT %(limit)s OFFSET %(offset)s",
                {"project": project_id, "limit": limit, "offset": offset},
            )
        ).fetchall()
        count = await (
            await connection.execute(
                "SELECT count(*) AS n FROM tasks t WHERE NOT t.internal AND " + READABLE,
                {"project": project_id},
            )
        ).fetchone()
    assert count is not None
    return rows, count["n"]


INSERT: LiteralString = """
WITH number AS (
    -- The project's row is the lock: numbers neither collide nor run backwards.
    UPDATE projects SET next_task_number = next_task_number + 1 WHERE id = %(project)s
    RETURNING next_task_number - 1 AS n
)
INSERT INTO tasks (project_id, task_number, created_by_id, title, title_manually_set, description,
    origin_product, repository, github_integration_id, github_user_integration_id, signal_report_id,
    json_schema, internal, ci_prompt)
SELECT %(project)s, n, %(user)s, %(title)s, %(title_manually_set)s, %(description)s,
    %(origin_product)s, %(repository)s, %(github_integration)s, %(github_user_integration)s,
    %(signal_report)s, %(json_schema)s, %(internal)s, %(ci_prompt)s
FROM number
RETURNING id
"""


async def insert(connection: Connection, project_id: int, user_id: int, fields: Mapping[str, Any]) -> UUID:
    schema = fields["json_schema"]
    params = {**fields, "project": project_id, "user": user_id}
    params["json_schema"] = None if schema is None else Jsonb(schema)
    row = await (await connection.execute(INSERT, params)).fetchone()
    assert row is not None
    return UUID(str(row["id"]))


COLUMNS = {
    "title": "title",
    "title_manually_set": "title_manually_set",
    "description": "description",
    "origin_product": "origin_product",
    "repository": "repository",
    "github_integration": "github_integration_id",
    "github_user_integration": "github_user_integration_id",
    "signal_report": "signal_report_id",
    "json_schema": "json_schema",
    "internal": "internal",
    "ci_prompt": "ci_prompt",
}


async def update(connection: Connection, project_id: int, task_id: UUID, changes: Mapping[str, Any]) -> bool:
    """Write the changed fields; `updated_at` always moves. False when there is no such task."""
    params: dict[str, Any] = {"project": project_id, "task": task_id}
    parts: list[sql.Composable] = [
        sql.SQL("updated_at = greatest(clock_timestamp(), t.updated_at + interval '1 microsecond')")
    ]
    for name, value in changes.items():
        if column := COLUMNS.get(name):
            parts.append(sql.SQL("{} = {}").format(sql.Identifier(column), sql.Placeholder(name)))
            params[name] = Jsonb(value) if name == "json_schema" and value is not None else value
    query = sql.SQL("UPDATE tasks t SET {} WHERE t.id = %(task)s AND {} RETURNING t.id").format(
        sql.SQL(", ").join(parts), sql.SQL(READABLE)
    )
    return await (await connection.execute(query, params)).fetchone() is not None


async def soft_delete(connection: Connection, project_id: int, task_id: UUID) -> bool:
    query: LiteralString = (
        "UPDATE tasks t SET deleted_at = clock_timestamp() WHERE t.id = %(task)s AND "
        + READABLE
        + " RETURNING t.id"
    )
    params = {"project": project_id, "task": task_id}
    return await (await connection.execute(query, params)).fetchone() is not None
