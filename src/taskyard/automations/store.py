"""SQL of automations. What they share with their task (name, prompt, repository) is the task's."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg import sql

from taskyard.accounts.caller import Caller
from taskyard.db.engine import Connection, Database, Row, fetch_one
from taskyard.tasks import filters

OF_PROJECT: LiteralString = "a.project_id = %(project)s"
OWN: LiteralString = (
    " AND EXISTS (SELECT FROM tasks t WHERE t.id = a.task_id" + filters.OWN + ")"  # be it deleted
)


def readable(caller: Caller) -> tuple[LiteralString, dict[str, Any]]:
    """The one place that scopes automations: to the caller's project, and to tasks that the caller may see."""
    scope = {"project": caller.project.id, "viewer": caller.user_id}
    return (OF_PROJECT if caller.sees_all else OF_PROJECT + OWN), scope


SELECT: LiteralString = """
SELECT a.*, t.title, t.description, t.repository, t.github_integration_id, t.deleted_at AS task_deleted_at,
    r.status AS run_status, r.created_at AS run_created_at, r.error_message AS run_error
FROM task_automations a
JOIN tasks t ON t.id = a.task_id
LEFT JOIN runs r ON r.id = a.last_run_id
"""


async def get(source: Database | Connection, caller: Caller, automation_id: UUID) -> Row | None:
    """An automation with what it shows of its task and its last run."""
    where, scope = readable(caller)
    query: LiteralString = SELECT + " WHERE a.id = %(id)s AND " + where
    return await fetch_one(source, query, **scope, id=automation_id)


async def lock(connection: Connection, caller: Caller, automation_id: UUID) -> Row | None:
    """The same, locked until the transaction ends. The automation is locked before its task, everywhere."""
    where, scope = readable(caller)
    query: LiteralString = SELECT + " WHERE a.id = %(id)s AND " + where + " FOR UPDATE OF a"
    return await (await connection.execute(query, {**scope, "id": automation_id})).fetchone()


async def page(database: Database, caller: Caller, limit: int, offset: int) -> tuple[list[Row], int]:
    """One page of the list, by the task's title, and the whole count."""
    where, scope = readable(caller)
    rows = await database.fetch(
        SELECT
        + " WHERE "
        + where
        + " ORDER BY t.title, a.created_at DESC, a.id LIMIT %(limit)s OFFSET %(offset)s",
        **scope,
        limit=limit,
        offset=offset,
    )
    count = await database.fetch_one("SELECT count(*) AS n FROM task_automations a WHERE " + where, **scope)
    assert count is not None
    return rows, count["n"]


async def insert(
    connection: Connection, project_id: int, user_id: int, task_id: UUID, fields: Mapping[str, Any]
) -> UUID:
    row = await (
        await connection.execute(
            "INSERT INTO task_automations (project_id, created_by_id, task_id, cron_expression, timezone,"
            " template_id, enabled, next_run_at)"
            " VALUES (%(project)s, %(user)s, %(task)s, %(cron_expression)s, %(timezone)s, %(template_id)s,"
            " %(enabled)s, %(next_run_at)s) RETURNING id",
            {**fields, "project": project_id, "user": user_id, "task": task_id},
        )
    ).fetchone()
    assert row is not None
    return UUID(str(row["id"]))


COLUMNS = frozenset(
    {
        "cron_expression",
        "timezone",
        "template_id",
        "enabled",
        "next_run_at",
        "last_run_id",
        "error",
        "failed_starts",
        "enabled_at",
    }
)


async def update(connection: Connection, automation_id: UUID, changes: Mapping[str, Any]) -> None:
    """Write the named columns of a locked automation; `updated_at` always moves."""
    params: dict[str, Any] = {"id": automation_id}
    parts: list[sql.Composable] = [
        sql.SQL("updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')")
    ]
    for name, value in changes.items():
        if name in COLUMNS:
            parts.append(sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name)))
            params[name] = value
    query = sql.SQL("UPDATE task_automations SET {} WHERE id = %(id)s").format(sql.SQL(", ").join(parts))
    await connection.execute(query, params)


async def delete(connection: Connection, caller: Caller, automation_id: UUID) -> bool:
    where, scope = readable(caller)
    query: LiteralString = (
        "DELETE FROM task_automations a WHERE a.id = %(id)s AND " + where + " RETURNING a.id"
    )
    return await (await connection.execute(query, {**scope, "id": automation_id})).fetchone() is not None


async def newest_run(connection: Connection, task_id: UUID, automation_id: UUID) -> UUID:
    """The newest run that a locked automation has started; there is one."""
    row = await (
        await connection.execute(
            "SELECT id FROM runs WHERE task_id = %(task)s AND state->>'automation_id' = %(automation)s::text"
            " ORDER BY created_at DESC, id DESC LIMIT 1",
            {"task": task_id, "automation": automation_id},
        )
    ).fetchone()
    assert row is not None
    return UUID(str(row["id"]))


# --- the schedule: all projects ------------------------------------------------------------------------


async def now(source: Database | Connection) -> datetime:
    """The database's clock: the one that all workers share."""
    row = await fetch_one(source, "SELECT clock_timestamp() AS now")
    assert row is not None
    moment: datetime = row["now"]
    return moment


async def lock_due(connection: Connection, moment: datetime) -> Row | None:
    """An automation whose time has come and that nobody else is firing, locked; with project and creator."""
    return await (
        await connection.execute(
            """
            SELECT a.*, t.deleted_at AS task_deleted_at, p.name AS project_name, p.organization_id,
                u.email, u.is_staff, m.role
            FROM task_automations a
            JOIN tasks t ON t.id = a.task_id
            JOIN projects p ON p.id = a.project_id
            LEFT JOIN users u ON u.id = a.created_by_id
            LEFT JOIN memberships m ON m.project_id = a.project_id AND m.user_id = a.created_by_id
            WHERE a.enabled AND a.next_run_at <= %(now)s
            ORDER BY a.next_run_at LIMIT 1
            FOR UPDATE OF a SKIP LOCKED
            """,
            {"now": moment},
        )
    ).fetchone()


async def next_due(database: Database) -> datetime | None:
    """When the next automation fires; None without any."""
    row = await database.fetch_one("SELECT min(next_run_at) AS at FROM task_automations WHERE enabled")
    assert row is not None
    at: datetime | None = row["at"]
    return at


async def lock_failing(connection: Connection, in_a_row: int) -> Row | None:
    """An enabled automation whose newest ended runs since it was enabled all failed, so many of them; locked.

    A cancelled run says nothing about the automation.
    """
    return await (
        await connection.execute(
            """
            SELECT a.*, newest.error_message AS run_error
            FROM task_automations a
            CROSS JOIN LATERAL (
                SELECT count(*) AS runs, bool_and(ended.status = 'failed') AS failed,
                    (array_agg(ended.error_message ORDER BY ended.created_at DESC, ended.id DESC))[1]
                        AS error_message
                FROM (
                    SELECT r.id, r.created_at, r.status, r.error_message FROM runs r
                    WHERE r.task_id = a.task_id AND r.state->>'automation_id' = a.id::text
                        AND r.status IN ('completed', 'failed') AND r.created_at >= a.enabled_at
                    ORDER BY r.created_at DESC, r.id DESC LIMIT %(count)s
                ) ended
            ) newest
            WHERE a.enabled AND newest.failed AND newest.runs = %(count)s
            LIMIT 1
            FOR UPDATE OF a SKIP LOCKED
            """,
            {"count": in_a_row},
        )
    ).fetchone()
