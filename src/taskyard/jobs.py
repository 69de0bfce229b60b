"""The job engine: Procrastinate on our database. A run is driven by one job, `drive`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, LiteralString, TypeVar
from uuid import UUID

import procrastinate
import structlog
from procrastinate.connector import Notify
from procrastinate.exceptions import ConnectorException

from taskyard.db.engine import AWAY, Connection, Database

log = structlog.get_logger()
T = TypeVar("T")

DRIVE = "drive"
QUEUE = "runs"


async def enqueue_drive(connection: Connection, run_id: UUID) -> None:
    """Enqueue the job that drives a run, inside the caller's transaction.

    At most one job of a run is worked on at any time (`lock`).
    """
    await _engine.configure_task(
        DRIVE, queue=QUEUE, lock=f"run:{run_id}", connection=connection, allow_unknown=True
    ).defer_async(run_id=str(run_id))


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


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A run that should be driven, or a job that should be finished, and nobody holds the lease."""

    run_id: UUID
    job_id: int | None
    """The job that somebody took and does not work on; None when the run has no job at all."""


async def abandoned(database: Database) -> list[Abandoned]:
    """What a worker left that died, or lost its answer from the database. Also true for a moment of healthy runs."""
    rows = await database.fetch(
        """
        SELECT r.id AS run_id, j.id AS job_id
        FROM runs r JOIN run_cursors c ON c.run_id = r.id
            LEFT JOIN procrastinate_jobs j ON j.lock = 'run:' || r.id::text AND j.status IN ('todo', 'doing')
        WHERE r.started_at IS NOT NULL AND r.status IN ('queued', 'in_progress')
            AND (c.leased_until IS NULL OR c.leased_until < clock_timestamp()) AND j.id IS NULL
        UNION ALL
        SELECT c.run_id, j.id
        FROM procrastinate_jobs j JOIN run_cursors c ON c.run_id = (j.args ->> 'run_id')::uuid
        WHERE j.task_name = %(drive)s AND j.status = 'doing'
            AND (c.leased_until IS NULL OR c.leased_until < clock_timestamp())
        """,
        drive=DRIVE,
    )
    return [Abandoned(row["run_id"], row["job_id"]) for row in rows]


_engine = engine()
