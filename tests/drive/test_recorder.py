"""Batched writing under a lease."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import psycopg
import pytest

from taskyard.db.engine import Database
from taskyard.drive.recorder import FULL_BYTES, Recorder
from taskyard.events import store
from taskyard.events.entries import Entry, Shown
from taskyard.runs import store as runs
from taskyard.runs.store import Lease
from tests.support.rows import make_run


async def leased(database: Database) -> Lease:
    claimed = await runs.claim(database, await make_run(database), "test")
    assert claimed is not None
    return claimed.lease


async def stored(database: Database, lease: Lease) -> list[int]:
    rows = await store.read(database, lease.run_id, Shown.BOTH, after=0, limit=100_000)
    return [json.loads(row.data) for row in rows]


async def test_order_is_kept_and_flush_waits(database: Database) -> None:
    lease = await leased(database)
    recorder = Recorder(database, lease, on_lost=lambda: None)
    for number in range(3000):
        recorder.add(Entry(str(number)))
        if number % 500 == 0:
            await asyncio.sleep(0)
    await recorder.flush()
    assert await stored(database, lease) == list(range(3000))
    await recorder.close()


async def test_a_burst_is_few_statements(database: Database) -> None:
    lease = await leased(database)
    recorder = Recorder(database, lease, on_lost=lambda: None)
    recorder.add(Entry("0"))
    await recorder.flush()
    for number in range(1, 101):
        recorder.add(Entry(str(number)))
    await recorder.flush()
    rows = await database.fetch(
        "SELECT xmin::text, count(*) AS n FROM events WHERE run_id = %(run)s GROUP BY 1", run=lease.run_id
    )
    assert sorted(row["n"] for row in rows) == [1, 100]
    await recorder.close()


async def test_a_lost_lease_is_told_and_ends_writing(database: Database) -> None:
    lease = await leased(database)
    told = asyncio.Event()
    recorder = Recorder(database, lease, on_lost=told.set)
    await database.execute("UPDATE run_cursors SET generation = generation + 1")
    recorder.add(Entry("1"))
    async with asyncio.timeout(30):
        await told.wait()
        await recorder.flush()
    recorder.add(Entry("2"))
    await recorder.close()
    assert await stored(database, lease) == []


async def test_a_full_backlog_holds_the_producer_back(database: Database) -> None:
    lease = await leased(database)
    recorder = Recorder(database, lease, on_lost=lambda: None)
    recorder.add(Entry(json.dumps("x" * (FULL_BYTES + 1))))
    waiting = asyncio.ensure_future(recorder.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    async with asyncio.timeout(30):
        await waiting
    await recorder.close()


async def test_the_loss_of_all_connections_loses_nothing(database: Database) -> None:
    lease = await leased(database)
    recorder = Recorder(database, lease, on_lost=lambda: None)
    for number in range(200):
        recorder.add(Entry(str(number)))
        if number % 50 == 25:
            await recorder.flush()
            await database.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
    await recorder.flush()
    assert await stored(database, lease) == list(range(200))
    await recorder.close()


async def test_an_answer_that_got_lost_doubles_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await leased(database)
    append, lost = store.append, 0

    async def losing(*arguments: Any, **options: Any) -> int:
        nonlocal lost
        last = await append(*arguments, **options)
        if lost < 2:
            lost += 1
            raise psycopg.OperationalError("the connection was lost after the commit")
        return last

    monkeypatch.setattr(store, "append", losing)
    recorder = Recorder(database, lease, on_lost=lambda: None)
    recorder.add(Entry("1"), Entry("2"))
    await recorder.flush()
    async with database.connection() as connection:
        await append(connection, lease.run_id, [Entry("3"), Entry("4")])  # a client's
    recorder.add(Entry("5"), Entry("5"))
    await recorder.flush()
    recorder.add(Entry("5"), Entry("5"))
    await recorder.flush()
    await recorder.close()
    assert lost == 2
    assert await stored(database, lease) == [1, 2, 3, 4, 5, 5, 5, 5]


async def test_a_new_driver_looks_behind_what_was_there_when_it_came(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await make_run(database)
    async with database.connection() as connection:
        last = await store.append(connection, run_id, [Entry("1")] * 50)
    claimed = await runs.claim(database, run_id, "test")
    assert claimed is not None
    assert claimed.last_seq == last
    append, read = store.append, store.read
    looks: list[int] = []

    async def failing_once(*arguments: Any, **options: Any) -> int:
        if not looks:
            looks.append(0)
            raise psycopg.OperationalError("the connection was lost")
        return await append(*arguments, **options)

    async def noted(*arguments: Any, after: int, limit: int) -> list[store.Stored]:
        looks.append(after)
        return await read(*arguments, after=after, limit=limit)

    monkeypatch.setattr(store, "append", failing_once)
    monkeypatch.setattr(store, "read", noted)
    recorder = Recorder(database, claimed.lease, on_lost=lambda: None, written=claimed.last_seq)
    recorder.add(Entry("1"))
    await recorder.flush()
    await recorder.close()
    assert looks == [0, last]
    monkeypatch.undo()
    assert await stored(database, claimed.lease) == [1] * 51


async def test_a_bug_in_writing_lets_nobody_wait_for_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: Any, **__: Any) -> int:
        raise psycopg.DataError("that cannot be stored")

    monkeypatch.setattr(store, "append", failing)
    told = asyncio.Event()
    recorder = Recorder(database, await leased(database), on_lost=told.set)
    recorder.add(Entry("1"))
    async with asyncio.timeout(30):
        await told.wait()
        await recorder.flush()
        await recorder.room()
    assert recorder.lost
    await recorder.close()
