"""The worker: takes `drive` jobs from the job engine and drives their runs."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from uuid import UUID

import procrastinate
import structlog

from taskyard.db.engine import Database
from taskyard.db.hub import Hub
from taskyard.drive.driver import Parts, drive
from taskyard.errors import SetupError
from taskyard.jobs import DRIVE, QUEUE, engine
from taskyard.sandbox.bubblewrap import BubblewrapProvider
from taskyard.sandbox.provider import SandboxError
from taskyard.sandbox.selftest import selftest
from taskyard.settings import Settings

log = structlog.get_logger()

STALLED_S = 30
"""A worker without heartbeat for this long is dead; its jobs are given to others."""
SWEEP_S = 10
HELD_S = 5
"""When a run is still held by a worker that may be dead, its job tries again after this time."""


@asynccontextmanager
async def running_worker(settings: Settings, database: Database) -> AsyncIterator[None]:
    """A worker inside this event loop, for as long as the block lasts.

    Raises SetupError when this machine cannot run sandboxes. On leaving, live runs get `worker.drain_s`
    seconds to finish.
    """
    provider = await checked_provider(settings)
    await remove_leftovers(provider)
    hub = Hub(database.url)
    await hub.start()
    name = f"{socket.gethostname()}:{os.getpid()}"
    parts = Parts(settings, database, hub, provider, name)
    app = engine(database.url)
    _register(app, parts)
    async with app.open_async():
        work = asyncio.create_task(
            app.run_worker_async(
                queues=[QUEUE],
                name=name,
                concurrency=settings.worker.concurrency,
                fetch_job_polling_interval=2.0,
                shutdown_graceful_timeout=settings.worker.drain_s,
                install_signal_handlers=False,
                delete_jobs="successful",
                stalled_worker_timeout=STALLED_S,
            ),
            name="worker",
        )
        sweep = asyncio.create_task(_take_over(app), name="take over stalled jobs")
        try:
            yield
        finally:
            sweep.cancel()
            work.cancel()
            for task in (sweep, work):
                with suppress(asyncio.CancelledError):
                    await task
            await hub.stop()


async def checked_provider(settings: Settings) -> BubblewrapProvider:
    """The sandbox provider, after its self-test; SetupError names everything that this machine lacks for it."""
    provider = BubblewrapProvider(settings)
    problems = await provider.check()
    if not any(problem.fatal and not problem.ok for problem in problems):
        problems += await selftest(provider)
    for problem in problems:
        if not problem.ok and not problem.fatal:
            log.warning("sandbox", check=problem.name, detail=problem.detail, remedy=problem.remedy)
    fatal = [problem for problem in problems if problem.fatal and not problem.ok]
    if fatal:
        lines = [f"{problem.name}: {problem.detail} {problem.remedy}".strip() for problem in fatal]
        raise SetupError("this machine cannot run sandboxes.\n" + "\n".join(lines))
    return provider


async def remove_leftovers(provider: BubblewrapProvider) -> None:
    """Remove the sandboxes of servers that died; those in use are left alone."""
    for name in await provider.list():
        try:
            left = await provider.attach(name)
            if left is not None:
                await left.destroy()
                log.info("removed a sandbox that a dead server left", sandbox=name)
        except SandboxError as error:
            log.debug("left a sandbox alone", sandbox=name, reason=error.detail)


def _register(app: procrastinate.App, parts: Parts) -> None:
    retry = procrastinate.RetryStrategy(wait=HELD_S, retry_exceptions=[RunHeldError])

    @app.task(name=DRIVE, queue=QUEUE, retry=retry)
    async def drive_job(run_id: str) -> None:
        if not await drive(parts, UUID(run_id)):
            raise RunHeldError


class RunHeldError(Exception):
    """Another worker holds the run; it is alive, or its lease has yet to run out."""


async def _take_over(app: procrastinate.App) -> None:
    """Give the jobs of dead workers back to the queue."""
    manager = app.job_manager
    while True:
        try:
            for job in await manager.get_stalled_jobs(queue=QUEUE, seconds_since_heartbeat=STALLED_S):
                log.warning(
                    "taking over a job of a dead worker", job=job.id, run=job.task_kwargs.get("run_id")
                )
                await manager.retry_job(job)
            await manager.prune_stalled_workers(STALLED_S)
        except procrastinate.exceptions.ConnectorException as error:
            log.warning("cannot look for stalled jobs", error=str(error))
        await asyncio.sleep(SWEEP_S)
