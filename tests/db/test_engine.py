"""The pool of connections, when the database was away."""

from __future__ import annotations

import asyncio
import time

import psycopg
from psycopg import errors

from taskyard.db.engine import Database, DatabaseUnavailableError
from tests.support.outage import outage
from tests.support.yard import eventually


async def test_connections_that_died_are_met_once(database: Database) -> None:
    await asyncio.gather(*(database.fetch("SELECT pg_sleep(0.3)") for _ in range(6)))
    async with await psycopg.AsyncConnection.connect(database.url, autocommit=True) as other:
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    refused = 0
    for _ in range(10):
        try:
            await database.fetch("SELECT 1")
        except errors.OperationalError:
            refused += 1
        await asyncio.sleep(0.05)
    assert refused <= 1


async def test_a_long_outage_is_over_when_it_is_over(database: Database) -> None:
    async def ask() -> bool:
        try:
            await database.fetch("SELECT 1")
        except (errors.OperationalError, DatabaseUnavailableError):
            return False
        return True

    async def keep_asking() -> None:
        while True:
            await ask()
            await asyncio.sleep(0.5)

    assert await ask()
    asking = asyncio.create_task(keep_asking())
    await outage(database, 12)
    asking.cancel()
    begun = time.monotonic()
    await eventually(ask, bool, str)
    assert time.monotonic() - begun < 3.5  # by doubled waits it would be up to as long as the outage
