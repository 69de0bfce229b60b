"""The worker: drives the runs that it takes off the queue, and does the work of the house."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from uuid import UUID

import procrastinate
import structlog
from procrastinate.exceptions import ConnectorException

from taskyard.agents.adapters import adapters, installed
from taskyard.artifacts import retention
from taskyard.automations import clock
from taskyard.db.engine import AWAY, Database
from taskyard.db.hub import Hub
from taskyard.dispatch import Dispatcher, end
from taskyard.drive.held import Drain, Parts
from taskyard.errors import SetupError
from taskyard.events import compaction
from taskyard.jobs import DRIVE, QUEUE, PatientConnector, engine, enqueue_drive
from taskyard.objects.interface import ObjectStore, StorageError
from taskyard.objects.service import open_store
from taskyard.runs.workers import Worker
from taskyard.sandbox.place import place_of
from taskyard.sandbox.provider import Provider
from taskyard.sandbox.providers import provider_for
from taskyard.sandbox.selftest import selftest
from taskyard.settings import Settings
from taskyard.sweep import Sweeper

log = structlog.get_logger()

FORGET_S = 3600
"""The job engine forgets a worker without heartbeat after this time. It must not forget one that lives."""
RESTART_S = 1
STOP_S = 2
JOBS = 4
"""Jobs of the house at once, beside the runs."""
RETENTION = "*/10 * * * *"
"""How often stored objects are looked through for those whose time is over."""


@asynccontextmanager
async def running_worker(
    settings: Settings, database: Database, hurry: asyncio.Event | None = None
) -> AsyncIterator[None]:
    """A worker inside this event loop, for as long as the block lasts.

    Raises SetupError when this machine cannot run sandboxes. On leaving, turns may go on for `worker.drain_s`
    seconds, less if `hurry` is set; what is not over then is handed to the next worker.
    """
    provider = await checked_provider(settings)
    able = await provider.capabilities()
    hub = Hub(database.url)
    await hub.start()
    # The last part tells it from one that died with the same host name and process id, as in a container.
    name = f"{settings.worker.name or socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}"
    objects = await open_store(settings, database)
    place = place_of(settings.data_dir)
    parts = Parts(settings, database, hub, provider, objects, name, place, Drain())
    agents = adapters(settings)
    # What an image has is known when it is used.
    there = partial(installed, agents.values()) if "host-programs" in able else partial(sorted, agents)
    dispatcher = Dispatcher(
        parts,
        Worker(
            name=name,
            pools=list(dict.fromkeys(settings.worker.pools)),
            capacity=settings.worker.concurrency,
            sandboxes=[settings.sandbox.provider],
            agents=there(),
        ),
        there,
    )
    sweeper = Sweeper(provider, database, objects, settings, place)
    app = engine(database.url)
    _register(app, parts, objects)
    compaction.register(app, database, objects, settings.logs)
    async with app.open_async():
        work = asyncio.create_task(_work(app, name), name="job engine")
        dispatch = asyncio.create_task(dispatcher.keep(), name="queue of runs")
        sweep = asyncio.create_task(sweeper.keep(), name="sweep")
        schedules = asyncio.create_task(clock.keep(database, frozenset(agents)), name="automations")
        try:
            yield
        finally:
            assert isinstance(app.connector, PatientConnector)
            app.connector.stopping = True
            parts.drain.begin(settings.worker.drain_s)
            await asyncio.gather(
                end(dispatch, STOP_S), end(schedules, STOP_S), end(sweep, STOP_S), end(work, 2 * STOP_S)
            )
            hurrying = asyncio.create_task(_hurry(hurry or asyncio.Event(), parts.drain), name="hurry")
            await dispatcher.drain(settings.worker.drain_s)
            await end(hurrying, STOP_S)
            await objects.close()
            await hub.stop()
            await provider.close()


async def _hurry(hurry: asyncio.Event, drain: Drain) -> None:
    await hurry.wait()
    drain.begin(0)


async def _work(app: procrastinate.App, name: str) -> None:
    """The job engine's worker, started again should it end by itself: the house would go untidied for ever."""
    while not _stopping(app):  # a cancel may come out of the engine as another error
        try:
            await app.run_worker_async(
                queues=[QUEUE],
                name=name,
                concurrency=JOBS,
                fetch_job_polling_interval=2.0,
                shutdown_graceful_timeout=STOP_S,
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


async def checked_provider(settings: Settings) -> Provider:
    """The sandbox provider, after its self-test; SetupError names everything that this machine lacks for it."""
    provider = provider_for(settings)
    try:
        await _check(provider)
    except BaseException:
        await provider.close()
        raise
    return provider


async def _check(provider: Provider) -> None:
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


def _register(app: procrastinate.App, parts: Parts, objects: ObjectStore) -> None:
    @app.task(name=DRIVE, queue=QUEUE)
    async def drive_job(run_id: str) -> None:
        """From an API process of a version without the queue."""
        async with parts.database.transaction() as connection:
            await enqueue_drive(connection, UUID(run_id))

    @app.periodic(cron=RETENTION)
    @app.task(name="retention", queue=QUEUE, queueing_lock="retention")
    async def retention_job(timestamp: int) -> None:
        """Remove what nobody needs any more. What fails now is done by the next one."""
        try:
            await retention.sweep(parts.database, objects)
        except (StorageError, *AWAY) as error:
            log.warning("cannot remove old objects, trying again later", error=str(error).strip())
