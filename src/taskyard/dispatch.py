"""Takes runs off the queue and drives them, as many at once as the worker has room for.

A notification says that there may be something to take. Every few seconds the worker looks anyway: it says that it is
there, and puts back into the queue what other workers lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from uuid import UUID

import structlog
from procrastinate.exceptions import ConnectorException

from taskyard.db.engine import AWAY, raise_cancelled
from taskyard.db.hub import QUEUE
from taskyard.drive.asleep import end_sleepers
from taskyard.drive.driver import drive
from taskyard.drive.held import Parts
from taskyard.drive.space import free_bytes
from taskyard.runs import queue, workers
from taskyard.runs.workers import Worker

log = structlog.get_logger()

SWEEP_S = 5.0
LOST_S = 3.0
"""A run that is found lost twice, this long apart, goes back into the queue: after an outage of the database, live
drivers renew their leases within two seconds."""
RESTART_S = 1.0
DRIVERS_S = 45.0
"""Drivers bring their runs to a good place in this time after the drain; as long again to clean up, once stopped."""


class Dispatcher:
    """`agents` tells which agents could start here at this moment: they may be installed later, too."""

    def __init__(self, parts: Parts, worker: Worker, agents: Callable[[], list[str]]) -> None:
        self._parts = parts
        self._database = parts.database
        self._worker = worker
        self._agents = agents
        self._limits = queue.Limits.of(parts.settings)
        self._driving: set[asyncio.Task[None]] = set()
        self._lost: set[UUID] = set()
        self._full = False

    async def keep(self) -> None:
        """Take and drive until cancelled; then `drain` ends what is going on."""
        loop = asyncio.get_running_loop()
        sweep_at = loop.time()
        with self._parts.hub.subscribe(QUEUE) as wake:
            while True:
                try:
                    if loop.time() >= sweep_at:
                        sweep_at = loop.time() + SWEEP_S
                        await self._sweep()
                        if self._lost:
                            sweep_at = loop.time() + LOST_S
                    while len(self._driving) < self._worker.capacity and await self._has_space():
                        run_id = await queue.take(self._database, self._worker, self._limits)
                        if run_id is None:
                            break
                        task = asyncio.create_task(self._drive(run_id), name=f"drive {run_id}")
                        self._driving.add(task)
                        task.add_done_callback(self._driving.discard)
                        task.add_done_callback(lambda _: wake.set())
                    wait_s = max(sweep_at - loop.time(), 0)
                except AWAY as error:
                    log.warning("cannot look into the queue of runs", error=str(error).strip())
                    wait_s = RESTART_S
                except Exception:  # a worker that takes nothing any more would look alive
                    log.exception("looking into the queue of runs failed")
                    wait_s = RESTART_S
                raise_cancelled()
                await wake.wait(wait_s)

    async def _has_space(self) -> bool:
        """A worker with a full disk takes nothing: another one may, or it waits until there is space again."""
        wanted, folder = self._parts.settings.worker.min_free_mb * 2**20, self._parts.settings.data_dir
        free = await asyncio.to_thread(free_bytes, folder)
        if (full := free < wanted) and not self._full:
            log.error("the disk is full: taking no runs", free_mb=free // 2**20, wanted_mb=wanted // 2**20)
        self._full = full
        return not full

    async def drain(self, drain_s: float) -> None:
        """Let turns go on for some seconds, then stop their drivers; call it after the end of `keep`."""
        self._parts.drain.begin(drain_s)
        await self._if_there(workers.beat(self._database, self._worker, stopping=True))
        driving = set(self._driving)
        if driving:
            log.info("waiting for turns to end", runs=len(driving), seconds=drain_s)
            await asyncio.wait(driving, timeout=drain_s + DRIVERS_S)
        await asyncio.gather(*(end(task, DRIVERS_S) for task in driving))
        await self._if_there(queue.give_all_back(self._database, self._worker.name))
        await self._if_there(workers.leave(self._database, self._worker.name))

    async def _drive(self, run_id: UUID) -> None:
        try:
            await drive(self._parts, run_id)
        except asyncio.CancelledError:
            # One that has not begun, or was not brought to its end, is for the next worker.
            await self._if_there(queue.restore(self._database, [run_id]))
            raise
        except Exception:
            log.exception("the driver of a run failed", run=str(run_id))
            await asyncio.sleep(RESTART_S)
        finally:
            await self._if_there(queue.give_back(self._database, run_id, self._worker.name))

    async def _sweep(self) -> None:
        """What has to be done from time to time, whoever does it."""
        self._worker = replace(self._worker, agents=await asyncio.to_thread(self._agents))
        space = await self._has_space()
        said = self._worker if space else replace(self._worker, capacity=0)
        await workers.beat(self._database, said)
        found = await queue.lost(self._database)
        for run_id in await queue.restore(self._database, found & self._lost):
            log.warning("a run was lost, and waits for another driver", run=str(run_id))
        self._lost = found - self._lost
        await queue.drop_ended(self._database)
        await end_sleepers(self._parts)
        for run_id in await queue.time_out(self._database, self._parts.settings.runs.queue_timeout_s):
            log.warning("no worker took a run in time", run=str(run_id))

    async def _if_there(self, work: Awaitable[object]) -> None:
        """What others do in a few seconds if the database is away now."""
        try:
            await work
        except AWAY as error:
            raise_cancelled()
            log.warning("could not tell the queue of runs", error=str(error).strip())


async def end(task: asyncio.Task[None], patience_s: float) -> None:
    """Cancel a task and wait for its end. A cancel can get lost in the task; then it is told again."""
    stopped: set[asyncio.Task[None]] = set()
    while not stopped:
        task.cancel()
        stopped, alive = await asyncio.wait({task}, timeout=patience_s)
        for late in alive:
            log.warning("a part of the worker did not stop, telling it again", part=late.get_name())
    with suppress(asyncio.CancelledError, ConnectorException):
        task.result()
