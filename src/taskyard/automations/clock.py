"""Fires automations for as long as a worker lives.

Not a job of the job engine: a job would wait behind runs that last for hours.
"""

from __future__ import annotations

import asyncio

import structlog

from taskyard.automations import service, store
from taskyard.db.engine import AWAY, Database, raise_cancelled

log = structlog.get_logger()

LOOK_S = 15.0
"""New and changed automations are seen within this time; schedules are told in minutes."""
LEAST_S = 1.0


async def keep(database: Database, agents: frozenset[str]) -> None:
    """Fire what is due, and sleep until the next is. Every worker does; a firing makes one run all the same."""
    while True:
        wait = LOOK_S
        try:
            await service.fire_due(database, agents, await store.now(database))
            await service.pause_failing(database)
            if (due := await store.next_due(database)) is not None:
                left = (due - await store.now(database)).total_seconds()
                wait = min(max(left, LEAST_S), LOOK_S)
        except AWAY as error:
            log.warning("cannot look for due automations, trying again", error=str(error).strip())
        except Exception:
            # A bug must not end all schedules until somebody restarts the worker.
            log.exception("looking for due automations failed, trying again")
        raise_cancelled()
        await asyncio.sleep(wait)
