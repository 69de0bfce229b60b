"""SQL of runs, and of the lease a worker has on one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.types.json import Jsonb

from taskyard.accounts.caller import Caller
from taskyard.db.engine import Connection, Database, Row, fetch_one
from taskyard.runs.schemas import TERMINAL
from taskyard.tasks import filters

OF_TASK: LiteralString = "r.project_id = %(project)s AND r.task_id = %(task)s"
VISIBLE: LiteralString = " AND EXISTS (SELECT FROM tasks t WHERE t.id = r.task_id" + filters.OWN + ")"


def readable(caller: Caller, task_id: UUID) -> tuple[LiteralString, dict[str, Any]]:
    """The one place that scopes runs: to a task of the caller's project that the caller may see.

    Runs of a deleted task stay readable (tasks-api §4.5).
    """
    scope = {"project": caller.project.id, "task": task_id, "viewer": caller.user_id}
    return (OF_TASK if caller.sees_all else OF_TASK + VISIBLE), scope


async def get(database: Database, caller: Caller, task_id: UUID, run_id: UUID) -> Row | None:
    """The run, and under `queued` whether it waits for a driver."""
    where, scope = readable(caller, task_id)
    return await database.fetch_one(
        "SELECT r.*, EXISTS (SELECT FROM run_queue q WHERE q.run_id = r.id) AS queued"
        " FROM runs r WHERE r.id = %(run)s AND " + where,
        **scope,
        run=run_id,
    )


async def get_locked(connection: Connection, caller: Caller, task_id: UUID, run_id: UUID) -> Row | None:
    """The same, locked until the transaction ends."""
    where, scope = readable(caller, task_id)
    return await (
        await connection.execute(
            "SELECT r.* FROM runs r WHERE r.id = %(run)s AND " + where + " FOR NO KEY UPDATE OF r",
            {**scope, "run": run_id},
        )
    ).fetchone()


async def page(
    database: Database, caller: Caller, task_id: UUID, limit: int, offset: int
) -> tuple[list[Row], int]:
    """One page of a task's runs, newest first, and their count."""
    where, scope = readable(caller, task_id)
    rows = await database.fetch(
        "SELECT r.* FROM runs r WHERE "
        + where
        + " ORDER BY r.created_at DESC, r.id DESC LIMIT %(limit)s OFFSET %(offset)s",
        **scope,
        limit=limit,
        offset=offset,
    )
    count = await database.fetch_one("SELECT count(*) AS n FROM runs r WHERE " + where, **scope)
    assert count is not None
    return rows, count["n"]


async def task_exists(database: Database, caller: Caller, task_id: UUID) -> bool:
    """Whether the caller may see the task, be it deleted."""
    query: LiteralString = "SELECT 1 FROM tasks t WHERE t.id = %(task)s AND t.project_id = %(project)s"
    _, scope = readable(caller, task_id)
    return await database.fetch_one(query if caller.sees_all else query + filters.OWN, **scope) is not None


async def exists(database: Database, project_id: int, task_id: UUID, run_id: UUID) -> bool:
    """Whether there is such a run: for its agent, which sees it whoever made it."""
    query: LiteralString = "SELECT 1 FROM runs r WHERE r.id = %(run)s AND " + OF_TASK
    return await database.fetch_one(query, project=project_id, task=task_id, run=run_id) is not None


async def distinct_id(database: Database, user_id: int) -> str:
    row = await database.fetch_one("SELECT distinct_id FROM users WHERE id = %(user)s", user=user_id)
    return "" if row is None else str(row["distinct_id"])


async def json_schema(connection: Connection, task_id: UUID) -> Any:
    """The schema that a task's output has to fit; None without one."""
    row = await (
        await connection.execute("SELECT json_schema FROM tasks WHERE id = %(task)s", {"task": task_id})
    ).fetchone()
    return None if row is None else row["json_schema"]


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


async def of_task(connection: Connection, task_id: UUID, run_id: UUID) -> Row | None:
    """A run of a task that the caller may see."""
    return await (
        await connection.execute(
            "SELECT * FROM runs WHERE id = %(run)s AND task_id = %(task)s", {"run": run_id, "task": task_id}
        )
    ).fetchone()


async def chain(database: Database, row: Row) -> list[UUID]:
    """A run and those it resumes, oldest first: same task, at most 10 hops, each run once (tasks-api §6.2)."""
    rows = await database.fetch(
        """
        WITH RECURSIVE chain AS (
            SELECT id, task_id, state, 0 AS hops, ARRAY[id] AS seen FROM runs WHERE id = %(run)s
            UNION ALL
            SELECT earlier.id, earlier.task_id, earlier.state, chain.hops + 1, chain.seen || earlier.id
            FROM chain JOIN runs earlier ON earlier.task_id = chain.task_id
                -- Compared as text: a client may have put anything there.
                AND earlier.id::text = lower(chain.state ->> 'resume_from_run_id')
            WHERE chain.hops < 10 AND earlier.id <> ALL (chain.seen)
        )
        SELECT id FROM chain ORDER BY hops DESC
        """,
        run=row["id"],
    )
    return [item["id"] for item in rows]


async def lock(connection: Connection, run_id: UUID) -> Row | None:
    """The run, locked until the transaction ends.

    The weaker of the two locks: a new event refers to the run, and must not wait for who holds it, since it
    holds the cursor that the other wants next.
    """
    return await (
        await connection.execute("SELECT * FROM runs WHERE id = %(run)s FOR NO KEY UPDATE", {"run": run_id})
    ).fetchone()


async def save(connection: Connection, row: Row, *, start: bool = False) -> Row:
    """Write back the changeable fields of a locked run; `updated_at` grows strictly.

    A run that has ended is not driven any more: `started_at` is emptied, `completed_at` set if it was empty.
    With `start` it is driven from now on.
    """
    saved = await (
        await connection.execute(
            "UPDATE runs SET status = %(status)s, stage = %(stage)s, branch = %(branch)s,"
            " environment = %(environment)s, error_message = %(error_message)s, output = %(output)s,"
            " state = %(state)s,"
            " completed_at = CASE WHEN %(ended)s THEN coalesce(%(completed_at)s, clock_timestamp())"
            " ELSE %(completed_at)s END,"
            " started_at = CASE WHEN %(ended)s THEN NULL WHEN %(start)s THEN clock_timestamp()"
            " ELSE %(started_at)s END,"
            " updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')"
            " WHERE id = %(id)s RETURNING *",
            {
                **row,
                "output": None if row["output"] is None else Jsonb(row["output"]),
                "state": Jsonb(row["state"]),
                "ended": row["status"] in TERMINAL,
                "start": start,
            },
        )
    ).fetchone()
    assert saved is not None
    return saved


async def set_artifacts(connection: Connection, run_id: UUID, artifacts: list[dict[str, Any]]) -> Row:
    """The artifacts that a new run begins with."""
    row = await (
        await connection.execute(
            "UPDATE runs SET artifacts = %(artifacts)s WHERE id = %(run)s RETURNING *",
            {"run": run_id, "artifacts": Jsonb(artifacts)},
        )
    ).fetchone()
    assert row is not None
    return row


async def keep_user_token(connection: Connection, run_id: UUID, sealed: bytes, hours: int) -> None:
    """Keep a person's encrypted token beside a run for some hours; forget those that have expired."""
    await connection.execute("DELETE FROM run_user_tokens WHERE expires_at < clock_timestamp()")
    await connection.execute(
        "INSERT INTO run_user_tokens (run_id, token, expires_at)"
        " VALUES (%(run)s, %(token)s, clock_timestamp() + make_interval(hours => %(hours)s))",
        {"run": run_id, "token": sealed, "hours": hours},
    )


async def user_token(source: Database | Connection, run_id: UUID) -> bytes | None:
    """The encrypted token that is kept beside a run; None when there is none, or it has expired."""
    row = await fetch_one(
        source,
        "SELECT token FROM run_user_tokens WHERE run_id = %(run)s AND expires_at > clock_timestamp()",
        run=run_id,
    )
    return None if row is None else bytes(row["token"])


async def notify(connection: Connection, run_id: UUID) -> None:
    """Tell whoever drives the run to look at its rows."""
    await connection.execute("SELECT pg_notify('taskyard', 'r:' || %(run)s::text)", {"run": run_id})


async def sleeps_with_mail(connection: Connection, run_id: UUID) -> bool:
    """Whether no worker has the run, and commands wait in its mailbox."""
    rows = await connection.execute(
        "SELECT 1 FROM run_cursors c WHERE c.run_id = %(run)s AND c.suspended_at IS NOT NULL"
        " AND EXISTS (SELECT FROM commands m WHERE m.run_id = c.run_id AND m.delivered_at IS NULL)",
        {"run": run_id},
    )
    return await rows.fetchone() is not None


# --- the lease ---------------------------------------------------------------------------------------

LEASE_S = 20
"""A worker that is silent for this long has lost its runs; it renews every third of it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to drive one run: every write of the driver carries the generation."""

    run_id: UUID
    generation: int
    attempt: int = 1
    """1 for the first worker that drives the run since it was started."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A run as its new worker finds it."""

    lease: Lease
    place: str | None
    """The data folder of the worker that had it before."""
    resumes: int
    """How many workers in a row were lost with it, without progress."""
    driven_s: float
    """Seconds since a worker drove it first."""
    turn: dict[str, Any] | None
    """What was going on: see resume.Turn; None when nothing was begun yet."""
    idle_s: float
    """Seconds since the end of the last turn."""
    last_seq: int
    """The number of the newest entry of its record."""


async def claim(
    database: Database, run_id: UUID, worker: str, place: str | None = None, *, taken: bool = False
) -> Claimed | None:
    """Take a run that nobody holds, or that the queue holds for this worker; None while somebody else does.

    `place` names the worker's data folder. With `taken` only one that the queue still holds for this worker: a
    worker that came too late had a slot that may be somebody else's by now.

    A worker that gave the run back in order is not there any more; one that is was lost with it.
    """
    row = await database.fetch_one(
        "UPDATE run_cursors c SET generation = c.generation + 1, held_generation = c.generation + 1,"
        " worker = %(worker)s, place = %(place)s, suspended_at = NULL, due_at = NULL, reserved_by = NULL,"
        " leased_until = clock_timestamp() + make_interval(secs => %(lease)s),"
        " driven_since = coalesce(c.driven_since, clock_timestamp()),"
        " resumes = c.resumes + (c.worker IS NOT NULL)::int"
        # The lock is on both: what was there before is read after whoever held it.
        " FROM (SELECT run_id, place FROM run_cursors WHERE run_id = %(run)s FOR UPDATE) before"
        " WHERE c.run_id = before.run_id AND (c.reserved_by = %(worker)s"
        " OR (NOT %(taken)s AND (c.leased_until IS NULL OR c.leased_until < clock_timestamp())))"
        " RETURNING c.generation, c.generation - c.started_generation AS attempt, before.place, c.resumes, c.turn,"
        " c.last_seq,"
        " extract(epoch FROM clock_timestamp() - c.driven_since)::float AS driven_s,"
        " extract(epoch FROM clock_timestamp() - coalesce((c.turn ->> 'ended_at')::timestamptz, clock_timestamp()))"
        "::float AS idle_s",
        run=run_id,
        worker=worker,
        place=place,
        taken=taken,
        lease=LEASE_S,
    )
    if row is None:
        return None
    lease = Lease(run_id, row["generation"], row["attempt"])
    names = ("place", "resumes", "driven_s", "turn", "idle_s", "last_seq")
    return Claimed(lease, *(row[name] for name in names))


async def ask_to_complete(connection: Connection, run_id: UUID) -> bool:
    """Tell the worker that drives a locked run to complete it; False when none does, or it sleeps."""
    row = await (
        await connection.execute(
            "UPDATE run_cursors c SET completing = true FROM runs r"
            " WHERE c.run_id = %(run)s AND r.id = c.run_id AND r.started_at IS NOT NULL"
            " AND c.leased_until > clock_timestamp() AND c.suspended_at IS NULL RETURNING 1",
            {"run": run_id},
        )
    ).fetchone()
    if row is not None:
        await notify(connection, run_id)
    return row is not None


async def take_away(connection: Connection, run_id: UUID) -> None:
    """Begin anew: who holds the run may write nothing more, and the next worker counts as the first.

    The lease itself stays until its holder has cleaned up, or it runs out.
    """
    await connection.execute(
        "UPDATE run_cursors SET generation = generation + 1, started_generation = generation + 1,"
        " completing = false, place = NULL, suspended_at = NULL, due_at = NULL, driven_since = NULL, resumes = 0,"
        " turn = NULL WHERE run_id = %(run)s",
        {"run": run_id},
    )


@dataclass(frozen=True, slots=True)
class Watched:
    """What a driver has to know of its run from time to time."""

    held: bool
    """The lease still holds."""
    wanted: bool
    """The run has not ended, and was not handed to a client."""
    ended: bool
    completing: bool
    """Its output is there: publish what is left, and complete it."""
    quiet_s: float | None
    """Seconds since the last sign of life from outside; None without one."""
    mail: bool
    """A command waits for an answer."""


async def watch(database: Database, lease: Lease) -> Watched:
    row = await database.fetch_one(
        "SELECT c.generation = %(generation)s AS held, r.started_at IS NOT NULL AS wanted, c.completing,"
        " r.status IN ('completed', 'failed', 'cancelled') AS ended,"
        " extract(epoch FROM clock_timestamp() - c.heartbeat_at)::float AS quiet_s,"
        " EXISTS (SELECT FROM commands m WHERE m.run_id = r.id AND m.answered_at IS NULL) AS mail"
        " FROM runs r JOIN run_cursors c ON c.run_id = r.id WHERE r.id = %(run)s",
        run=lease.run_id,
        generation=lease.generation,
    )
    return Watched(False, False, True, False, None, False) if row is None else Watched(**row)


async def renew(database: Database, lease: Lease) -> bool:
    """Hold the lease for another term; False when it is lost."""
    row = await database.fetch_one(
        "UPDATE run_cursors SET leased_until = clock_timestamp() + make_interval(secs => %(lease)s)"
        # One that was found lost is gone: its slot may be somebody else's by now.
        " WHERE run_id = %(run)s AND generation = %(generation)s AND leased_until IS NOT NULL RETURNING 1",
        run=lease.run_id,
        generation=lease.generation,
        lease=LEASE_S,
    )
    return row is not None


async def release(database: Database, lease: Lease) -> None:
    """Give the run back, and wake the readers that wait for its end."""
    await database.execute(
        "WITH freed AS (UPDATE run_cursors SET leased_until = NULL, worker = NULL"
        " WHERE run_id = %(run)s AND held_generation = %(generation)s RETURNING run_id)"
        " SELECT pg_notify('taskyard', 'e:' || run_id::text) FROM freed",
        run=lease.run_id,
        generation=lease.generation,
    )


async def driven_here(database: Database, place: str, names: Collection[str]) -> set[str]:
    """Which of these are ids of runs that go on and were driven last from this data folder: their sandboxes are
    used again. Those of sleeping runs are not."""
    rows = await database.fetch(
        "SELECT r.id::text AS id FROM runs r JOIN run_cursors c ON c.run_id = r.id"
        " WHERE r.id = ANY(%(ids)s::uuid[]) AND r.started_at IS NOT NULL"
        " AND c.suspended_at IS NULL AND c.place = %(place)s",
        ids=[name for name in names if _CANONICAL.fullmatch(name)],
        place=place,
    )
    return {row["id"] for row in rows}


_CANONICAL = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
