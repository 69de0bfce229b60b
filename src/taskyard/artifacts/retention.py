"""Removing objects whose time is over (tasks-api §8): 1 day, 30 days for those of runs."""

from __future__ import annotations

import structlog

from taskyard.artifacts import store
from taskyard.db.engine import Database
from taskyard.objects.interface import ObjectStore

log = structlog.get_logger()

BATCH = 500


async def sweep(database: Database, objects: ObjectStore) -> int:
    """Remove all that nothing needs any more; how many objects that was.

    Several may do this at once. Objects go before their rows: what is interrupted is done again. Raises StorageError.
    """
    removed = 0
    while True:
        async with database.transaction() as connection:
            rows = await store.due(connection, BATCH)
            over = [row["key"] for row in rows if not row["needed"]]
            if needed := [row["key"] for row in rows if row["needed"]]:
                await store.hold(connection, needed)
            if over:
                await objects.delete(over)
                await store.forget(connection, over)
            removed += len(over)
        if len(rows) < BATCH:
            break
    async with database.connection() as connection:
        await store.forget_expired(connection)
    await objects.tidy()
    if removed:
        log.info("removed objects whose time was over", count=removed)
    return removed
