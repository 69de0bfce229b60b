"""The record: order, numbers, leases, what each reader sees."""

from __future__ import annotations

import asyncio
import json
from uuid import UUID

import pytest

from taskyard.db.engine import Database
from taskyard.events import entries, log, store
from taskyard.events.entries import Entry, Shown
from taskyard.events.record import Record
from taskyard.runs import store as runs
from tests.support.rows import make_run


def entry(text: str, shown: Shown = Shown.BOTH) -> Entry:
    return Entry(json.dumps(text), shown)


async def append(database: Database, run_id: UUID, *items: Entry, generation: int | None = None) -> int:
    async with database.connection() as connection:
        return await store.append(connection, run_id, items, generation=generation)


async def test_numbers_have_no_gap_and_keep_the_order(database: Database) -> None:
    run_id = await make_run(database)
    assert await append(database, run_id, entry("a"), entry("b")) == 2
    assert await append(database, run_id, entry("c")) == 3
    stored = await store.read(database, run_id, Shown.BOTH, after=0, limit=10)
    assert [(item.seq, json.loads(item.data)) for item in stored] == [(1, "a"), (2, "b"), (3, "c")]
    assert [item.id for item in stored] == sorted({item.id for item in stored})


async def test_appends_at_the_same_time_lose_nothing(database: Database) -> None:
    run_id = await make_run(database)
    await asyncio.gather(*(append(database, run_id, entry(f"{n}a"), entry(f"{n}b")) for n in range(40)))
    stored = await store.read(database, run_id, Shown.BOTH, after=0, limit=1000)
    assert [item.seq for item in stored] == list(range(1, 81))
    texts = [json.loads(item.data) for item in stored]
    # What one append brought stays together.
    assert all(texts[n + 1] == texts[n][:-1] + "b" for n in range(0, 80, 2))


async def test_times_in_ids_never_run_backwards(database: Database) -> None:
    run_id = await make_run(database)
    await append(database, run_id, entry("now"))
    await database.execute(
        "UPDATE run_cursors SET last_ms = last_ms + 100000 WHERE run_id = %(run)s", run=run_id
    )
    await append(database, run_id, entry("after the clock went back"))
    first, second = await store.read(database, run_id, Shown.BOTH, after=0, limit=10)
    assert second.at_ms >= first.at_ms + 100000


async def test_log_and_stream_see_their_part(database: Database) -> None:
    run_id = await make_run(database)
    await append(database, run_id, entry("both"), entry("log", Shown.LOG), entry("stream", Shown.STREAM))

    async def seen(shown: Shown) -> list[str]:
        return [
            json.loads(item.data) for item in await store.read(database, run_id, shown, after=0, limit=10)
        ]

    assert await seen(Shown.LOG) == ["both", "log"]
    assert await seen(Shown.STREAM) == ["both", "stream"]


async def test_text_is_stored_as_it_is(database: Database) -> None:
    run_id = await make_run(database)
    value = {"z": 1, "a": [1.50, None], "text": 'ä "\u2028 \x00 \ud83d\ude00', "big": 10**30}
    await append(database, run_id, entries.raw(value))
    [item] = await store.read(database, run_id, Shown.LOG, after=0, limit=1)
    assert item.data == json.dumps(value)
    assert "\n" not in item.data


async def test_a_lost_lease_writes_nothing(database: Database) -> None:
    run_id = await make_run(database)
    claimed = await runs.claim(database, run_id, "one")
    assert claimed is not None
    first = claimed.lease
    assert await runs.claim(database, run_id, "two") is None
    await append(database, run_id, entry("mine"), generation=first.generation)
    await database.execute(
        "UPDATE run_cursors SET leased_until = now() - interval '1 s' WHERE run_id = %(run)s", run=run_id
    )
    claimed = await runs.claim(database, run_id, "two")
    assert claimed is not None
    second = claimed.lease
    assert second.generation == first.generation + 1
    with pytest.raises(store.LeaseLostError):
        await append(database, run_id, entry("too late"), generation=first.generation)
    assert not await runs.renew(database, first)
    assert await runs.renew(database, second)
    assert len(await store.read(database, run_id, Shown.BOTH, after=0, limit=10)) == 1


async def test_log_lines_are_joined_without_a_newline_at_the_end(database: Database, record: Record) -> None:
    one, two = await make_run(database), await make_run(database)
    await append(database, one, *(entry(f"{n}") for n in range(2500)))
    await append(database, two, entry("last"))
    text = b"".join([part async for part in log.lines(record, [one, two])]).decode()
    assert [json.loads(line) for line in text.split("\n")] == [*map(str, range(2500)), "last"]


async def test_log_of_nothing_is_empty(database: Database, record: Record) -> None:
    run_id = await make_run(database)
    assert [part async for part in log.lines(record, [run_id])] == []
