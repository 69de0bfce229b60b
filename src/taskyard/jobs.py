"""The job engine, Procrastinate on our database, for the work of the house; and the way into the queue of runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, LiteralString, TypeVar
from uuid import UUID

import procrastinate
import structlog
from procrastinate.connector import Notify
from procrastinate.exceptions import ConnectorException

from taskyard.db import hub
from taskyard.db.engine import AWAY, Connection, Database

log = structlog.get_logger()
T = TypeVar("T")

DRIVE = "drive"
"""The job with which versions before the queue of runs had a run driven."""
QUEUE = "runs"
SILENT_S = 600
"""A worker of the job engine without a heartbeat for this long is dead; it beats every ten seconds."""

AGENT: LiteralString = "coalesce(nullif(r.state ->> 'agent', ''), r.state ->> 'runtime_adapter', '')"
"""Of a run `r`; '' stands for the default."""
ENQUEUE: LiteralString = (
    """
    WITH queued AS (
        INSERT INTO run_queue (run_id, project_id, environment_id, agent, priority, begun, since)
        SELECT r.id, r.project_id,
            CASE WHEN r.state ->> 'sandbox_environment_id' ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                THEN (r.state ->> 'sandbox_environment_id')::uuid ELSE '00000000-0000-0000-0000-000000000000' END,
            """
    + AGENT
    + """,
            CASE WHEN r.state ->> 'priority' ~ '^-?[0-9]{1,4}$' THEN (r.state ->> 'priority')::int ELSE 0 END,
            r.status = 'in_progress',
            -- A new run keeps its place whatever becomes of its first worker.
            CASE WHEN r.status = 'in_progress' THEN clock_timestamp()
                ELSE coalesce(r.started_at, clock_timestamp()) END
        FROM runs r JOIN run_cursors c ON c.run_id = r.id WHERE r.id = %(run)s
        FOR NO KEY UPDATE OF c  -- the cursor before the queue: who takes a run does so, too
        ON CONFLICT (run_id) DO UPDATE SET environment_id = excluded.environment_id, agent = excluded.agent,
            priority = excluded.priority, begun = excluded.begun,
            since = CASE WHEN run_queue.begun AND excluded.begun THEN run_queue.since ELSE excluded.since END
        RETURNING 1
    )
    SELECT pg_notify('taskyard', '"""
    + hub.QUEUE
    + """') FROM queued
    """
)


async def enqueue_drive(connection: Connection, run_id: UUID) -> None:
    """This run wants a driver, from the commit of the caller's transaction on.

    It waits in the queue until a worker takes it (runs/queue.py). Once more does nothing; while a driver still
    cleans up after it, the next one waits for that.
    """
    await connection.execute(ENQUEUE, {"run": run_id})


async def update_waiting(connection: Connection, run_id: UUID) -> None:
    """A waiting run counts for the agent that its state names now. After its cursor was locked: see ENQUEUE."""
    query: LiteralString = "UPDATE run_queue q SET agent = " + AGENT + " FROM runs r WHERE r.id = q.run_id"
    await connection.execute(query + " AND q.run_id = %(run)s AND q.agent <> " + AGENT, {"run": run_id})


def engine(url: str | None = None) -> procrastinate.App:
    """An engine; with a URL one that has its own connections, as a worker needs."""
    connector = PatientConnector(conninfo=url) if url else procrastinate.PsycopgConnector()
    return procrastinate.App(connector=connector)


class PatientConnector(procrastinate.PsycopgConnector):
    """Waits while the database is away. Without that, any outage ends the engine's worker, and its live jobs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stopping = False
        """Set when the worker is to end: it then does not wait for a database any more."""

    async def execute_query_async(self, query: LiteralString, **arguments: Any) -> None:
        ask = super().execute_query_async
        await self._patiently(lambda: ask(query, **arguments))

    async def execute_query_one_async(self, query: LiteralString, **arguments: Any) -> dict[str, Any]:
        ask = super().execute_query_one_async
        return await self._patiently(lambda: ask(query, **arguments))

    async def execute_query_all_async(self, query: LiteralString, **arguments: Any) -> list[dict[str, Any]]:
        ask = super().execute_query_all_async
        return await self._patiently(lambda: ask(query, **arguments))

    async def listen_notify(self, on_notification: Notify, channels: Iterable[str]) -> None:
        listen, channels = super().listen_notify, list(channels)
        await self._patiently(lambda: listen(on_notification=on_notification, channels=channels))

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        delay = 0.1
        while True:
            try:
                return await work()
            except ConnectorException as error:
                if self.stopping or not isinstance(error.__cause__, AWAY):
                    raise
                log.warning("the job engine waits for the database", error=str(error.__cause__).strip())
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)


async def forget_lost(database: Database) -> None:
    """Remove the jobs whose worker died with them, and those that failed: the next of each comes by itself."""
    await database.execute(
        "DELETE FROM procrastinate_jobs j WHERE j.status IN ('failed', 'cancelled', 'aborted')"
        " OR (j.status = 'doing' AND NOT EXISTS (SELECT FROM procrastinate_workers w WHERE w.id = j.worker_id"
        " AND w.last_heartbeat > clock_timestamp() - make_interval(secs => %(silent)s)))",
        silent=SILENT_S,
    )
