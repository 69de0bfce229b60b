"""The job engine: Procrastinate on our database. A run is driven by one job, `drive`."""

from __future__ import annotations

from uuid import UUID

import procrastinate

from taskyard.db.engine import Connection

DRIVE = "drive"
QUEUE = "runs"


async def enqueue_drive(connection: Connection, run_id: UUID) -> None:
    """Enqueue the job that drives a run, inside the caller's transaction.

    At most one job of a run waits at any time (`queueing_lock`), and at most one runs (`lock`).
    """
    await _engine.configure_task(
        DRIVE, queue=QUEUE, lock=f"run:{run_id}", connection=connection, allow_unknown=True
    ).defer_async(run_id=str(run_id))


def engine(url: str | None = None) -> procrastinate.App:
    """An engine; with a URL one that has its own connections, as a worker needs."""
    connector = procrastinate.PsycopgConnector(conninfo=url) if url else procrastinate.PsycopgConnector()
    return procrastinate.App(connector=connector)


_engine = engine()
