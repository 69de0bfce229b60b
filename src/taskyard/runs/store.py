"""SQL of runs, and of the lease a worker has on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.types.json import Jsonb

from taskyard.db.engine import Connection, Database, Row

READABLE: LiteralString = "r.project_id = %(project)s AND r.task_id = %(task)s"
"""The one place that scopes runs to a task of a project. Runs of a deleted task stay readable (tasks-api §4.5)."""


async def get(database: Database, project_id: int, task_id: UUID, run_id: UUID) -> Row | None:
    return await database.fetch_one(
        "SELECT r.* FROM runs r WHERE r.id = %(run)s AND " + READABLE,
        project=project_id,
        task=task_id,
        run=run_id,
    )


async def page(
    database: Database, project_id: int, task_id: UUID, limit: int, offset: int
) -> tuple[list[Row], int]:
    """One page of a task's runs, newest first, and their count."""
    scope = {"project": project_id, "task": task_id}
    rows = await database.fetch(
        "SELECT r.* FROM runs r WHERE "
        + READABLE
        + " ORDER BY r.created_at DESC, r.id DESC LIMIT %(limit)s OFFSET %(offset)s",
        **scope,
        limit=limit,
        offset=offset,
    )
    count = await database.fetch_one("SELECT count(*) AS n FROM runs r WHERE " + READABLE, **scope)
    assert count is not None
    return rows, count["n"]


async def task_exists(database: Database, project_id: int, task_id: UUID) -> bool:
    row = await database.fetch_one(
        "SELECT 1 FROM tasks WHERE id = %(task)s AND project_id = %(project)s",
        project=project_id,
        task=task_id,
    )
    return row is not None


async def insert(
    connection: Connection,
    task_id: UUID,
    project_id: int,
    user_id: int,
    *,
    environment: str,
    branch: str | None,
    state: dict[str, Any],
    started: bool,
) -> Row:
    """A queued run with its cursor."""
    row = await (
        await connection.execute(
            "INSERT INTO runs (task_id, project_id, created_by_id, status, environment, branch, state, started_at)"
            " VALUES (%(task)s, %(project)s, %(user)s, 'queued', %(environment)s, %(branch)s, %(state)s,"
            " CASE WHEN %(started)s THEN clock_timestamp() END) RETURNING *",
            {
                "task": task_id,
                "project": project_id,
                "user": user_id,
                "environment": environment,
                "branch": branch,
                "state": Jsonb(state),
                "started": started,
            },
        )
    ).fetchone()
    assert row is not None
    await connection.execute("INSERT INTO run_cursors (run_id) VALUES (%(run)s)", {"run": row["id"]})
    return row


async def lock(connection: Connection, run_id: UUID) -> Row | None:
    """The run, locked until the transaction ends."""
    return await (
        await connection.execute("SELECT * FROM runs WHERE id = %(run)s FOR UPDATE", {"run": run_id})
    ).fetchone()


async def save(connection: Connection, row: Row) -> Row:
    """Write back the changeable fields of a locked run; `updated_at` grows strictly."""
    saved = await (
        await connection.execute(
            "UPDATE runs SET status = %(status)s, stage = %(stage)s, branch = %(branch)s,"
            " error_message = %(error_message)s, output = %(output)s, state = %(state)s,"
            " completed_at = CASE WHEN %(ended)s THEN coalesce(completed_at, clock_timestamp())"
            " ELSE completed_at END,"
            " updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')"
            " WHERE id = %(id)s RETURNING *",
            {
                **row,
                "output": None if row["output"] is None else Jsonb(row["output"]),
                "state": Jsonb(row["state"]),
                "ended": row["status"] in ("completed", "failed", "cancelled"),
            },
        )
    ).fetchone()
    assert saved is not None
    return saved


async def notify(connection: Connection, run_id: UUID) -> None:
    """Tell whoever drives the run to look at its rows."""
    await connection.execute("SELECT pg_notify('taskyard', 'r:' || %(run)s::text)", {"run": run_id})


# --- the lease ---------------------------------------------------------------------------------------

LEASE_S = 30
"""A worker that is silent for this long has lost its runs; it renews every third of it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to drive one run: every write of the driver carries the generation."""

    run_id: UUID
    generation: int


async def claim(database: Database, run_id: UUID, worker: str) -> Lease | None:
    """Take a run that nobody holds; None while somebody does."""
    row = await database.fetch_one(
        "UPDATE run_cursors SET generation = generation + 1, worker = %(worker)s,"
        " leased_until = clock_timestamp() + make_interval(secs => %(lease)s)"
        " WHERE run_id = %(run)s AND (leased_until IS NULL OR leased_until < clock_timestamp())"
        " RETURNING generation",
        run=run_id,
        worker=worker,
        lease=LEASE_S,
    )
    return None if row is None else Lease(run_id, row["generation"])


async def renew(database: Database, lease: Lease) -> bool:
    """Hold the lease for another term; False when it is lost."""
    row = await database.fetch_one(
        "UPDATE run_cursors SET leased_until = clock_timestamp() + make_interval(secs => %(lease)s)"
        " WHERE run_id = %(run)s AND generation = %(generation)s RETURNING 1",
        run=lease.run_id,
        generation=lease.generation,
        lease=LEASE_S,
    )
    return row is not None


async def release(database: Database, lease: Lease) -> None:
    """Give the run back, and wake the readers that wait for its end."""
    await database.execute(
        "WITH freed AS (UPDATE run_cursors SET leased_until = NULL, worker = NULL"
        " WHERE run_id = %(run)s AND generation = %(generation)s RETURNING run_id)"
        " SELECT pg_notify('taskyard', 'e:' || run_id::text) FROM freed",
        run=lease.run_id,
        generation=lease.generation,
    )
