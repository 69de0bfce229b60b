"""The worker: takes `drive` jobs from the job engine and drives their runs."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from uuid import UUID

import procrastinate
import structlog
from procrastinate.exceptions import ConnectorException

from taskyard.agents.adapters import adapters
from taskyard.artifacts import retention
from taskyard.automations import clock
from taskyard.db.engine import AWAY, Database, raise_cancelled
from taskyard.db.hub import Hub
from taskyard.drive.driver import drive
from taskyard.drive.held import Parts
from taskyard.errors import SetupError
from taskyard.jobs import DRIVE, QUEUE, Abandoned, PatientConnector, abandoned, engine, enqueue_drive
from taskyard.objects.interface import ObjectStore, StorageError
from taskyard.objects.service import open_store
from taskyard.sandbox.bubblewrap import BubblewrapProvider
from taskyard.sandbox.provider import SandboxError
from taskyard.sandbox.selftest import selftest
from taskyard.settings import Settings

log = structlog.get_logger()

FORGET_S = 3600
"""The job engine forgets a worker without heartbeat after this time. It must not forget one that lives: who takes
over what is decided by the lease of the run, not by this."""
SWEEP_S = 5
"""A run that is found abandoned twice, this long apart, is taken over."""
RESTART_S = 1
STOP_S = 2
DRIVERS_S = 45
"""Drivers that are stopped after the drain write the end of their runs and clean up in this time."""
RETENTION = "*/10 * * * *"
"""How often stored objects are looked through for those whose time is over."""
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
    objects = await open_store(settings, database)
    _register(app, parts, objects)
    async with app.open_async():
        work = asyncio.create_task(_work(app, settings, name), name="worker")
        sweep = asyncio.create_task(_take_over(app, database), name="take over abandoned runs")
        agents = frozenset(adapters(settings))
        schedules = asyncio.create_task(clock.keep(database, agents), name="automations")
        try:
            yield
        finally:
            assert isinstance(app.connector, PatientConnector)
            app.connector.stopping = True
            await asyncio.gather(
                _end(sweep, STOP_S), _end(schedules, STOP_S), _end(work, settings.worker.drain_s + DRIVERS_S)
            )
            await objects.close()
            await hub.stop()


async def _end(task: asyncio.Task[None], patience_s: float) -> None:
    """Cancel a task and wait for its end. A cancel can get lost in the task; then it is told again."""
    stopped: set[asyncio.Task[None]] = set()
    while not stopped:
        task.cancel()
        stopped, alive = await asyncio.wait({task}, timeout=patience_s)
        for late in alive:
            log.warning("a part of the worker did not stop, telling it again", part=late.get_name())
    with suppress(asyncio.CancelledError, ConnectorException):
        task.result()


async def _work(app: procrastinate.App, settings: Settings, name: str) -> None:
    """The job engine's worker, started again should it end by itself: queued runs would wait for ever."""
    while not _stopping(app):  # a cancel may come out of the engine as another error
        try:
            await app.run_worker_async(
                queues=[QUEUE],
                name=name,
                concurrency=settings.worker.concurrency,
                fetch_job_polling_interval=2.0,
                shutdown_graceful_timeout=settings.worker.drain_s,
                install_signal_handlers=False,
                delete_jobs="successful",
                stalled_worker_timeout=FORGET_S,
            )
            log.error("the job engine stopped by itself, starting it again")
        except ConnectorException:
            if _stopping(app):
                return
            log.exception("the job engine failed, starting it again")
        await asyncio.sleep(RESTART_S)


def _stopping(app: procrastinate.App) -> bool:
    return isinstance(app.connector, PatientConnector) and app.connector.stopping


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


def _register(app: procrastinate.App, parts: Parts, objects: ObjectStore) -> None:
    retry = procrastinate.RetryStrategy(wait=HELD_S, retry_exceptions=[RunHeldError])

    @app.task(name=DRIVE, queue=QUEUE, retry=retry)
    async def drive_job(run_id: str) -> None:
        if not await drive(parts, UUID(run_id)):
            raise RunHeldError

    @app.periodic(cron=RETENTION)
    @app.task(name="retention", queue=QUEUE, queueing_lock="retention")
    async def retention_job(timestamp: int) -> None:
        """Remove what nobody needs any more. What fails now is done by the next one."""
        try:
            await retention.sweep(parts.database, objects)
        except (StorageError, *AWAY) as error:
            log.warning("cannot remove old objects, trying again later", error=str(error).strip())


class RunHeldError(Exception):
    """Another worker holds the run; it is alive, or its lease has yet to run out."""


async def _take_over(app: procrastinate.App, database: Database) -> None:
    """Have every run driven that should be, whatever happened to its worker or its job."""
    before: set[Abandoned] = set()
    while True:
        try:
            found = set(await abandoned(database))
            for one in found & before:
                log.warning("taking over an abandoned run", run=str(one.run_id), job=one.job_id)
                await _requeue(app, database, one)
            before = found - before
            await app.job_manager.prune_stalled_workers(FORGET_S)
        except (ConnectorException, *AWAY) as error:
            log.warning("cannot look for abandoned runs", error=str(error).strip())
        raise_cancelled()
        await asyncio.sleep(SWEEP_S)


async def _requeue(app: procrastinate.App, database: Database, one: Abandoned) -> None:
    if one.job_id is not None:
        with suppress(ConnectorException):  # another worker was faster, or the job has ended after all
            await app.job_manager.retry_job_by_id_async(one.job_id, retry_at=datetime.now(UTC))
    else:
        async with database.transaction() as connection:
            await enqueue_drive(connection, one.run_id)
