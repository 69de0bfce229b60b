"""The queue: which run gets a driver next, under which limits, and why one has to wait.

A run that wants a driver has a row in `run_queue` (written by jobs.enqueue_drive); a worker with room takes it.
One takes at a time (an advisory lock), and a lease is a slot from then on until it is given back or found lost, so
no limit is ever passed, however many workers take. Between projects the one with the fewest slots comes first, among
equals the one that waited longest since its last turn; in a project runs that began before, then the higher
priority, then the older.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.types.json import Jsonb

from taskyard.agents.adapters import DEFAULT_AGENT
from taskyard.db.engine import Connection, Database
from taskyard.db.hub import QUEUE
from taskyard.jobs import enqueue_drive
from taskyard.runs import lifecycle, store
from taskyard.runs.resume import Turn
from taskyard.runs.workers import DEFAULT_POOL, LIVE, Worker
from taskyard.settings import Settings

_LOCK = 7_307_411
"""Key of the advisory lock under which runs are taken and found lost."""

WANTED: LiteralString = "r.started_at IS NOT NULL AND r.status IN ('queued', 'in_progress')"
POOL: LiteralString = "coalesce(nullif(e.worker_pool, ''), %(default_pool)s)"
ORDER: LiteralString = "q.begun DESC, q.priority DESC, q.since, q.run_id"


@dataclass(frozen=True, slots=True)
class Limits:
    """How many runs are driven at once; None: no limit."""

    total: int | None = None
    per_project: int | None = None
    per_agent: int | None = None
    agents: Mapping[str, int] | None = None
    """Instead of `per_agent`, for single agents."""

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        agents = {name: agent.limit for name, agent in settings.agents.items() if agent.limit is not None}
        runs = settings.runs
        return cls(runs.limit, runs.limit_per_project, runs.limit_per_agent, agents)

    def of_agent(self, agent: str) -> int | None:
        return (self.agents or {}).get(agent, self.per_agent)


PICK: LiteralString = (
    """
    WITH held AS MATERIALIZED (
        SELECT r.project_id, coalesce(nullif(c.slot_agent, ''), %(default_agent)s) AS agent
        FROM run_cursors c JOIN runs r ON r.id = c.run_id WHERE c.leased_until IS NOT NULL
    ), of_project AS MATERIALIZED (
        SELECT project_id, count(*) AS driven FROM held GROUP BY project_id
    ), of_agent AS MATERIALIZED (
        SELECT agent, count(*) AS driven FROM held GROUP BY agent
    ), kinds AS MATERIALIZED (
        SELECT k.* FROM (
            SELECT project_id, agent, environment_id, coalesce(nullif(agent, ''), %(default_agent)s) AS who,
                min(since) AS since
            FROM run_queue GROUP BY project_id, agent, environment_id
        ) k LEFT JOIN sandbox_environments e ON e.id = k.environment_id LEFT JOIN of_agent a ON a.agent = k.who
        WHERE """
    + POOL
    + """ = ANY(%(pools)s)
            AND coalesce(a.driven < coalesce((%(agents)s::jsonb ->> k.who)::int, %(per_agent)s::int), true)
            -- An agent that is not installed here is left to those who have it; without any it is to fail with a word.
            AND (k.who = ANY(%(installed)s) OR NOT EXISTS (
                SELECT FROM workers w WHERE k.who = ANY(w.agents) AND """
    + POOL
    + " = ANY(w.pools) AND"
    + LIVE
    + """))
    ), turns AS MATERIALIZED (
        SELECT k.project_id, coalesce(p.driven, 0) AS driven, t.at, min(k.since) AS since
        FROM kinds k LEFT JOIN of_project p USING (project_id) LEFT JOIN queue_turns t USING (project_id)
        WHERE (%(total)s::int IS NULL OR (SELECT count(*) FROM held) < %(total)s)
            AND coalesce(p.driven < %(per_project)s::int, true)
        GROUP BY k.project_id, p.driven, t.at
    )
    SELECT q.run_id, q.project_id, q.agent
    FROM (SELECT * FROM turns ORDER BY driven, at NULLS FIRST, since, project_id) turn CROSS JOIN LATERAL (
        SELECT q.* FROM kinds k CROSS JOIN LATERAL (
            SELECT q.* FROM run_queue q JOIN run_cursors c ON c.run_id = q.run_id
            WHERE q.project_id = k.project_id AND q.agent = k.agent AND q.environment_id = k.environment_id
                AND c.leased_until IS NULL  -- else its last driver still cleans up
            ORDER BY """
    + ORDER
    + """ LIMIT 1
        ) q WHERE k.project_id = turn.project_id ORDER BY """
    + ORDER
    + """ LIMIT 1
    ) q
    -- They are in this order already: no more projects are looked at than it takes to find one.
    ORDER BY turn.driven, turn.at NULLS FIRST, turn.since, turn.project_id LIMIT 1
    """
)


async def take(database: Database, worker: Worker, limits: Limits) -> UUID | None:
    """Take the run that a worker is to drive next, and hold it for the worker to claim; None when there is none."""
    if await database.fetch_one("SELECT 1 FROM run_queue LIMIT 1") is None:
        return None
    async with database.transaction() as connection:
        await _alone(connection)
        found = await (
            await connection.execute(
                PICK,
                {
                    "pools": worker.pools,
                    "installed": worker.agents,
                    "total": limits.total,
                    "per_project": limits.per_project,
                    "per_agent": limits.per_agent,
                    "agents": Jsonb(dict(limits.agents or {})),
                    "default_agent": DEFAULT_AGENT,
                    "default_pool": DEFAULT_POOL,
                },
            )
        ).fetchone()
        if found is None:
            return None
        # The cursor before the queue, as everybody does: nobody waits for each other.
        held = await (
            await connection.execute(
                "UPDATE run_cursors SET reserved_by = %(worker)s, slot_agent = %(agent)s,"
                " leased_until = clock_timestamp() + make_interval(secs => %(lease)s)"
                " WHERE run_id = %(run_id)s AND leased_until IS NULL RETURNING 1",
                {**found, "worker": worker.name, "lease": store.LEASE_S},
            )
        ).fetchone()
        if held is None:  # a worker of a version without the queue was faster
            return None
        await connection.execute("DELETE FROM run_queue WHERE run_id = %(run_id)s", found)
        await connection.execute(
            "INSERT INTO queue_turns VALUES (%(project_id)s, clock_timestamp())"
            " ON CONFLICT (project_id) DO UPDATE SET at = excluded.at",
            found,
        )
        return UUID(str(found["run_id"]))


async def give_back(database: Database, run_id: UUID, worker: str) -> None:
    """A worker is done with a run that it took: others may have waited for the slot.

    What it took and did not claim goes back to its place in the queue.
    """
    async with database.transaction() as connection:
        row = await (
            await connection.execute(
                "UPDATE run_cursors SET reserved_by = NULL, leased_until = NULL"
                " WHERE run_id = %(run)s AND reserved_by = %(worker)s RETURNING 1",
                {"run": run_id, "worker": worker},
            )
        ).fetchone()
        if row is not None:
            await enqueue_drive(connection, run_id)
        else:
            await connection.execute(
                "SELECT pg_notify('taskyard', %(topic)s) WHERE EXISTS (SELECT FROM run_queue)",
                {"topic": QUEUE},
            )


async def give_all_back(database: Database, worker: str) -> None:
    """A worker ends: what it took and did not claim goes back."""
    rows = await database.fetch(
        "SELECT run_id FROM run_cursors WHERE leased_until IS NOT NULL AND reserved_by = %(worker)s",
        worker=worker,
    )
    for row in rows:
        await give_back(database, row["run_id"], worker)


# --- the safety net ----------------------------------------------------------------------------------


async def lost(database: Database) -> set[UUID]:
    """Runs whose lease ran out, and runs that should be driven but are neither held nor queued.

    Also true for a moment of healthy ones, after an outage of the database above all: act on what was found twice.
    """
    rows = await database.fetch(
        "SELECT c.run_id FROM run_cursors c"
        " WHERE c.leased_until IS NOT NULL AND c.leased_until < clock_timestamp()"
        " UNION ALL SELECT r.id FROM runs r JOIN run_cursors c ON c.run_id = r.id"
        " WHERE " + WANTED + " AND c.leased_until IS NULL AND c.suspended_at IS NULL"
        " AND NOT EXISTS (SELECT FROM run_queue q WHERE q.run_id = r.id)"
    )
    return {row["run_id"] for row in rows}


async def restore(database: Database, runs: Iterable[UUID]) -> list[UUID]:
    """Take lost leases away and put their runs back into the queue; those that were.

    The next driver also answers who waits for a run that has ended meanwhile.
    """
    restored = []
    for run_id in runs:
        async with database.transaction() as connection:
            await _alone(connection)
            row = await (
                await connection.execute(
                    # `worker` stays: the next one sees that this one was lost with the run.
                    "UPDATE run_cursors c SET leased_until = NULL, reserved_by = NULL FROM runs r"
                    " WHERE c.run_id = %(run)s AND r.id = c.run_id"
                    " AND (c.leased_until < clock_timestamp() OR (c.leased_until IS NULL AND " + WANTED + "))"
                    " RETURNING c.suspended_at IS NULL AS driven,"
                    " pg_notify('taskyard', 'e:' || c.run_id::text) IS NULL AS told",
                    {"run": run_id},
                )
            ).fetchone()
            if row is not None and row["driven"]:
                await enqueue_drive(connection, run_id)
                restored.append(run_id)
    return restored


async def drop_ended(database: Database) -> None:
    """Runs that ended while they waited need no driver, unless somebody waits for an answer of theirs."""
    await database.execute(
        "DELETE FROM run_queue q USING runs r WHERE r.id = q.run_id AND r.started_at IS NULL"
        # One that was started again just now is not meant.
        " AND q.since < coalesce(r.completed_at, r.updated_at)"
        " AND NOT EXISTS (SELECT FROM commands m WHERE m.run_id = q.run_id AND m.delivered_at IS NULL)"
    )


async def time_out(database: Database, timeout_s: float) -> list[UUID]:
    """Fail the runs that waited for longer than that; those that did."""
    rows = await database.fetch(
        "SELECT q.run_id FROM run_queue q JOIN runs r ON r.id = q.run_id JOIN run_cursors c ON c.run_id = q.run_id"
        " WHERE q.since < clock_timestamp() - make_interval(secs => %(timeout)s) AND c.leased_until IS NULL AND "
        + WANTED
        + " LIMIT 100",
        timeout=timeout_s,
    )
    return [row["run_id"] for row in rows if await _fail(database, row["run_id"], timeout_s)]


async def _fail(database: Database, run_id: UUID, timeout_s: float) -> bool:
    async with database.transaction() as connection:
        await store.lock(connection, run_id)
        waits = await (
            await connection.execute(
                # Whoever takes it locks the cursor: either it was taken before, or it finds that the run has ended.
                "SELECT c.turn FROM run_cursors c JOIN run_queue q ON q.run_id = c.run_id"
                " JOIN runs r ON r.id = c.run_id WHERE c.run_id = %(run)s AND c.leased_until IS NULL AND "
                + WANTED
                + " FOR NO KEY UPDATE OF c",
                {"run": run_id},
            )
        ).fetchone()
        if waits is None:
            return False
        message = (
            f"No worker took this run within {timeout_s:g} seconds. `taskyard admin workers` shows the workers; "
            "start it again when there is room, or raise runs.queue_timeout_s."
        )
        turn = Turn.of(waits["turn"])
        await lifecycle.change(
            connection,
            run_id,
            status="failed",
            error_message=message,
            state={"error_type": "queue_timeout"},
            **({} if turn is None else turn.output),
        )
        return True


async def _alone(connection: Connection) -> None:
    await connection.execute("SELECT pg_advisory_xact_lock(%(key)s)", {"key": _LOCK})


# --- for people --------------------------------------------------------------------------------------


async def waiting(database: Database, run_id: UUID, limits: Limits) -> dict[str, Any] | None:
    """`state.queue` of a run: its position among those of its project and pool that wait, from 1, and what it
    waits for. None when it does not wait."""
    row = await database.fetch_one(
        """
        WITH mine AS (
            SELECT q.*, coalesce(nullif(q.agent, ''), %(default_agent)s) AS who,
                c.leased_until IS NOT NULL AS cleaning, """
        + POOL
        + """ AS pool
            FROM run_queue q JOIN runs r ON r.id = q.run_id JOIN run_cursors c ON c.run_id = q.run_id
                LEFT JOIN sandbox_environments e ON e.id = q.environment_id
            WHERE q.run_id = %(run)s AND """
        + WANTED
        + """
        ), held AS MATERIALIZED (
            SELECT r.project_id, coalesce(nullif(c.slot_agent, ''), %(default_agent)s) AS agent,
                coalesce(c.reserved_by, c.worker) AS worker
            FROM run_cursors c JOIN runs r ON r.id = c.run_id WHERE c.leased_until IS NOT NULL
        ), crew AS MATERIALIZED (
            SELECT w.name, w.capacity, m.who = ANY(w.agents) AS able FROM workers w, mine m
            WHERE m.pool = ANY(w.pools) AND"""
        + LIVE
        + """
        ), takers AS MATERIALIZED (  -- without anybody who has its agent, whoever takes it fails it
            SELECT name, capacity, (SELECT count(*) FROM held WHERE held.worker = crew.name) AS driven
            FROM crew WHERE able OR NOT EXISTS (SELECT FROM crew WHERE able)
        )
        SELECT m.cleaning, m.pool, m.who,
            (SELECT count(*) FROM run_queue q JOIN runs r ON r.id = q.run_id
                LEFT JOIN sandbox_environments e ON e.id = q.environment_id
            WHERE q.project_id = m.project_id AND """
        + POOL
        + " = m.pool AND "
        + WANTED
        + """ AND (NOT q.begun, -q.priority, q.since, q.run_id)
                    <= (NOT m.begun, -m.priority, m.since, m.run_id)) AS position,
            (SELECT count(*) FROM held) AS held,
            (SELECT count(*) FROM held WHERE held.project_id = m.project_id) AS of_project,
            (SELECT count(*) FROM held WHERE held.agent = m.who) AS of_agent,
            (SELECT coalesce(sum(capacity), 0) FROM takers) AS capacity,
            (SELECT count(*) FROM takers) AS takers,
            (SELECT count(*) FROM takers WHERE driven < capacity) AS free,
            (SELECT count(*) FROM takers) < (SELECT count(*) FROM crew) AS lacking
        FROM mine m
        """,
        run=run_id,
        default_agent=DEFAULT_AGENT,
        default_pool=DEFAULT_POOL,
    )
    return None if row is None else {"position": row["position"], "reason": _reason(row, limits)}


def _reason(row: Mapping[str, Any], limits: Limits) -> str:
    of_agent = limits.of_agent(row["who"])
    if row["cleaning"]:
        return "its last worker is still cleaning up"
    if row["takers"] == 0:
        return f"no worker of the pool '{row['pool']}' is running"
    if limits.total is not None and row["held"] >= limits.total:
        return f"limit of {_runs(limits.total)} on this server"
    if limits.per_project is not None and row["of_project"] >= limits.per_project:
        return f"project limit of {_runs(limits.per_project)}"
    if of_agent is not None and row["of_agent"] >= of_agent:
        return f"limit of {_runs(of_agent)} of the agent '{row['who']}'"
    if row["free"] == 0:
        having = f" that have the agent '{row['who']}'" if row["lacking"] else ""
        why = "are busy" if row["capacity"] else "have a full disk"
        return f"all workers of the pool '{row['pool']}'{having} {why}"
    return "a worker is about to take it"


def _runs(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"
