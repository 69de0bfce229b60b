"""SQL of tasks. Whose and which tasks is said by a `Where` of `taskyard.tasks.filters`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, LiteralString
from uuid import UUID

import msgspec
from psycopg import AsyncCursor, sql
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from taskyard.db.engine import Connection, Database, Row
from taskyard.tasks.filters import Where

PROJECT_NAME: LiteralString = "(SELECT p.name FROM projects p WHERE p.id = %(project)s)"
TASK: tuple[LiteralString, ...] = (
    "t.id", "t.project_id", "t.task_number", "t.title", "t.title_manually_set", "t.description",
    "t.origin_product", "t.repository", "t.github_integration_id", "t.github_user_integration_id",
    "t.signal_report_id", "t.json_schema", "t.internal", "t.ci_prompt", "t.archived", "t.archived_at",
    "t.created_by_id", "t.created_at", "t.updated_at",
    PROJECT_NAME + " AS project_name",
    "u.id AS user_id", "u.uuid::text AS user_uuid", "u.distinct_id", "u.first_name", "u.last_name", "u.email",
)  # fmt: skip
RUN: tuple[LiteralString, ...] = (
    "r.id::text", "r.task_id::text", "r.stage", "r.branch", "r.status", "r.environment", "r.error_message",
    "r.output", "r.state", "r.artifacts", "r.created_at", "r.updated_at", "r.completed_at",
)  # fmt: skip
"""Columns by name: a prepared `*` fails once a newer version has added one."""

JOINS: LiteralString = (
    " t LEFT JOIN users u ON u.id = t.created_by_id LEFT JOIN runs r ON r.id = t.latest_run_id WHERE "
)
FROM: LiteralString = " FROM tasks" + JOINS
SELECT: LiteralString = "SELECT " + ", ".join(TASK + RUN) + FROM
"""A task with its creator and newest run."""
ONE: LiteralString = (
    "SELECT "
    + ", ".join(TASK + RUN)
    # Before there are statistics the planner takes an index of the project, and reads all of its tasks.
    + " FROM (SELECT * FROM tasks WHERE id = %(task)s OFFSET 0)"
    + JOINS
)


def _name(column: str) -> str:
    return column.rpartition(" AS ")[2].rpartition(".")[2].removesuffix("::text")


TASK_NAMES = tuple(map(_name, TASK))
RUN_NAMES = tuple(map(_name, RUN))


def _nested(values: Sequence[Any]) -> Row:
    """A row of `SELECT`: the task's columns, and its newest run or None under `run`."""
    count = len(TASK_NAMES)
    row = dict(zip(TASK_NAMES, values, strict=False))
    row["run"] = None if values[count] is None else dict(zip(RUN_NAMES, values[count:], strict=False))
    return row


def _rows(_: AsyncCursor[Any]) -> Callable[[Sequence[Any]], Row]:
    return _nested


async def _fetch(
    connection: Connection,
    query: LiteralString,
    parameters: Mapping[str, Any],
    *,
    prepare: bool | None = None,
) -> list[Row]:
    async with connection.cursor(row_factory=_rows) as cursor:
        await cursor.execute(query, parameters, prepare=prepare)
        return await cursor.fetchall()


async def get(source: Database | Connection, where: Where, task_id: UUID) -> Row | None:
    """The task with this id if it is among those; with its creator and newest run."""
    query: LiteralString = ONE + where.sql
    parameters = {**where.parameters, "task": task_id}
    if isinstance(source, Database):
        async with source.connection() as connection:
            rows = await _fetch(connection, query, parameters)
    else:
        rows = await _fetch(source, query, parameters)
    return rows[0] if rows else None


def counting(where: Where) -> LiteralString:
    """A query for the exact number of tasks."""
    if where.stage:
        return "SELECT count(*) AS n FROM tasks t WHERE " + where.sql
    tally: LiteralString = "repository_tally" if where.repository else "task_tally"
    return "SELECT coalesce(sum(t.n), 0)::bigint AS n FROM " + tally + " t WHERE " + where.sql


async def count(connection: Connection, where: Where) -> int:
    row = await (
        await connection.execute(counting(where), where.parameters, prepare=where.prepare)
    ).fetchone()
    assert row is not None
    return int(row["n"])


DEEP = 1000
"""From this offset on the rows before a page are counted off in an index, not read."""


async def page(connection: Connection, where: Where, limit: int, offset: int) -> tuple[list[Row], int]:
    """One page of a list, newest first, and how many tasks the whole list has."""
    if where.filters > 1 and not where.stage and (number := await count(connection, where)) <= offset:
        # That nothing has several properties is not seen in an index of one.
        return [], number
    parameters = {**where.parameters, "limit": limit, "offset": offset}
    start: LiteralString = ""
    if offset >= DEEP:
        start = (
            " AND t.task_number <= (SELECT t.task_number FROM tasks t WHERE "
            + where.sql
            + " ORDER BY t.task_number DESC LIMIT 1 OFFSET %(offset)s)"
        )
    query: LiteralString = (
        "SELECT "
        + ", ".join(TASK + RUN)
        + ", ("
        + counting(where)
        + ")"
        + FROM
        + where.sql
        + start
        + " ORDER BY t.task_number DESC LIMIT %(limit)s"
        + ("" if start else " OFFSET %(offset)s")
    )
    async with connection.cursor(row_factory=tuple_row) as cursor:
        await cursor.execute(query, parameters, prepare=where.prepare)
        found = await cursor.fetchall()
    if found:
        return [_nested(values) for values in found], found[0][-1]
    return [], 0 if offset == 0 else await count(connection, where)


async def numbered(connection: Connection, where: Where, numbers: Sequence[int]) -> list[Row]:
    """The tasks with these numbers, newest first."""
    return await _fetch(
        connection,
        SELECT + "t.task_number = ANY(%(numbers)s) AND " + where.sql + " ORDER BY t.task_number DESC",
        {**where.parameters, "numbers": list(numbers)},
    )


async def repositories(database: Database, where: Where) -> list[str]:
    """The repositories of tasks, each once, in the order of their characters."""
    rows = await database.fetch(
        "SELECT t.repository FROM repository_tally t WHERE t.repository <> '' AND NOT t.internal AND "
        + where.sql
        + ' GROUP BY t.repository HAVING sum(t.n) > 0 ORDER BY t.repository COLLATE "C"',
        **where.parameters,
    )
    return [row["repository"] for row in rows]


async def summaries(
    database: Database, where: Where, ids: Sequence[UUID], limit: int, offset: int
) -> tuple[list[Row], int]:
    """One page of the tasks with these ids, in short, newest first; and how many of them there are."""
    rows = await database.fetch(
        """
        WITH found AS MATERIALIZED (
            SELECT t.* FROM tasks t WHERE t.id = ANY(%(ids)s) AND """
        + where.sql
        + """
        ), page AS (SELECT * FROM found ORDER BY created_at DESC, id LIMIT %(limit)s OFFSET %(offset)s)
        SELECT n.count, page.id, page.title, page.repository, page.origin_product, page.created_at,
            page.updated_at, page.latest_status, r.environment
        FROM (SELECT count(*) FROM found) n LEFT JOIN page ON true LEFT JOIN runs r ON r.id = page.latest_run_id
        ORDER BY page.created_at DESC, page.id
        """,
        **where.parameters,
        ids=list(ids),
        limit=limit,
        offset=offset,
    )
    return [row for row in rows if row["id"] is not None], rows[0]["count"]


INSERT: LiteralString = (
    """
WITH p AS (
    -- The project's row is the lock: numbers neither collide nor run backwards.
    UPDATE projects SET next_task_number = next_task_number + %(count)s WHERE id = %(project)s
    RETURNING next_task_number - %(count)s AS number, name
), t AS (
    INSERT INTO tasks (project_id, task_number, created_by_id, title, title_manually_set, description,
        origin_product, repository, github_integration_id, github_user_integration_id, signal_report_id,
        json_schema, internal, ci_prompt, archived, archived_at)
    SELECT %(project)s, p.number + i.n - 1, i."user", i.title, i.title_manually_set, i.description,
        i.origin_product, i.repository, i.github_integration, i.github_user_integration, i.signal_report,
        i.json_schema, i.internal, i.ci_prompt, i.archived, CASE WHEN i.archived THEN clock_timestamp() END
    FROM p, ROWS FROM (json_to_recordset(%(items)s::json) AS (
        "user" integer, title text, title_manually_set boolean, description text, origin_product text,
        repository text, github_integration integer, github_user_integration uuid, signal_report uuid,
        json_schema jsonb, internal boolean, ci_prompt text, archived boolean)) WITH ORDINALITY AS i (
        "user", title, title_manually_set, description, origin_product, repository, github_integration,
        github_user_integration, signal_report, json_schema, internal, ci_prompt, archived, n)
    ORDER BY i.n
    RETURNING *
)
SELECT """
    + ", ".join(TASK).replace(PROJECT_NAME, "p.name")
    + ", NULL FROM t CROSS JOIN p LEFT JOIN users u ON u.id = t.created_by_id ORDER BY t.task_number"
)


def new_task(user_id: int, fields: Mapping[str, Any]) -> bytes:
    """A task for `insert`."""
    return msgspec.json.encode({**fields, "user": user_id})


async def insert(connection: Connection, project_id: int, items: Sequence[bytes]) -> list[Row]:
    """New tasks of one project with their creators, in this order, in one statement."""
    text = b"[" + b",".join(items) + b"]"
    return await _fetch(
        connection, INSERT, {"project": project_id, "count": len(items), "items": text.decode()}
    )


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
    "archived": "archived",
}


async def update(connection: Connection, where: Where, task_id: UUID, changes: Mapping[str, Any]) -> bool:
    """Write the changed fields; `updated_at` always moves. False when there is no such task among those."""
    params: dict[str, Any] = {**where.parameters, "task": task_id}
    parts: list[sql.Composable] = [
        sql.SQL("updated_at = greatest(clock_timestamp(), t.updated_at + interval '1 microsecond')")
    ]
    for name, value in changes.items():
        if column := COLUMNS.get(name):
            key = f"new_{name}"
            parts.append(sql.SQL("{} = {}").format(sql.Identifier(column), sql.Placeholder(key)))
            params[key] = Jsonb(value) if name == "json_schema" and value is not None else value
    if "archived" in changes:
        parts.append(
            sql.SQL(
                "archived_at = CASE WHEN %(new_archived)s THEN coalesce(t.archived_at, clock_timestamp()) END"
            )
        )
    query = sql.SQL("UPDATE tasks t SET {} WHERE t.id = %(task)s AND {} RETURNING t.id").format(
        sql.SQL(", ").join(parts), sql.SQL(where.sql)
    )
    return await (await connection.execute(query, params)).fetchone() is not None


async def soft_delete(connection: Connection, where: Where, task_id: UUID) -> bool:
    query: LiteralString = (
        "UPDATE tasks t SET deleted_at = clock_timestamp() WHERE t.id = %(task)s AND "
        + where.sql
        + " RETURNING t.id"
    )
    return (
        await (await connection.execute(query, {**where.parameters, "task": task_id})).fetchone() is not None
    )
