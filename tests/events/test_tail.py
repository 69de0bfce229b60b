"""What many readers of one run share, and what a silent stream costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import UUID

import psycopg
import pytest

from taskyard.db.engine import Database
from taskyard.db.hub import Hub
from taskyard.events import compaction, store, stream, tail
from taskyard.events.entries import Entry
from taskyard.events.record import Next, Record
from taskyard.events.tail import TAIL_BYTES, Tails
from taskyard.objects.interface import Content, ObjectStore
from taskyard.runs import store as runs
from tests.support.rows import make_run
from tests.support.yard import DEADLINE_S, eventually


class Counting(Record):
    """Counts the reads."""

    reads = 0

    async def next(self, run_id: UUID, after: int) -> Next:
        self.reads += 1
        return await super().next(run_id, after)


@pytest.fixture
def record(record: Record) -> Counting:
    counting = object.__new__(Counting)
    counting.__dict__.update(record.__dict__)
    return counting


async def append(database: Database, run_id: UUID, *texts: str, generation: int | None = None) -> int:
    async with database.connection() as connection:
        return await store.append(
            connection, run_id, [Entry(json.dumps(text)) for text in texts], generation=generation
        )


class Reader:
    """Reads a stream in the background."""

    def __init__(self, tails: Tails, run_id: UUID, *, after: int = 0, keepalive_s: float = 60) -> None:
        self.frames: list[bytes] = []
        self.keepalives = 0
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._frames = stream.frames(tails, run_id, after=after, keepalive_s=keepalive_s)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for chunk in self._frames:
            if chunk == stream.KEEPALIVE:
                self.keepalives += 1
            else:
                self.frames.append(chunk)
            await self.may_read.wait()

    @property
    def texts(self) -> list[str]:
        lines = b"".join(self.frames).decode().split("\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    async def has(self, count: int) -> None:
        await eventually(
            self._texts, lambda texts: len(texts) >= count, lambda texts: f"{count} of {len(texts)}"
        )
        assert len(self.texts) == count

    async def beats(self, count: int) -> None:
        await eventually(
            lambda: _value(self.keepalives), lambda n: n >= count, lambda n: f"{count} keepalives, {n}"
        )

    async def _texts(self) -> list[str]:
        return self.texts

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


@pytest.fixture
async def readers() -> AsyncIterator[list[Reader]]:
    started: list[Reader] = []
    yield started
    for reader in started:
        await reader.leave()


async def test_one_read_and_the_same_bytes_for_all(
    database: Database, tails: Tails, record: Counting, readers: list[Reader]
) -> None:
    run_id = await make_run(database)
    await append(database, run_id, "first")
    readers += [Reader(tails, run_id) for _ in range(1000)]
    for reader in readers:
        await reader.has(1)
    assert record.reads <= 3, "those who come at once share what they read"
    for n in range(3):
        before = record.reads
        await append(database, run_id, f"{n}")
        for reader in readers:
            await reader.has(2 + n)
        assert record.reads - before <= 2
        assert len({id(reader.frames[-1]) for reader in readers}) == 1


async def test_a_suspended_run_costs_only_keepalives_and_goes_on(
    database: Database, tails: Tails, record: Counting, readers: list[Reader]
) -> None:
    run_id = await make_run(database)
    claimed = await runs.claim(database, run_id, "one")
    assert claimed is not None
    await append(database, run_id, "before", generation=claimed.lease.generation)
    await runs.release(database, claimed.lease)
    readers += [Reader(tails, run_id, keepalive_s=0.05) for _ in range(20)]
    for reader in readers:
        await reader.has(1)
        await reader.beats(1)
    before = record.reads
    for reader in readers:
        await reader.beats(reader.keepalives + 10)
    assert record.reads == before
    claimed = await runs.claim(database, run_id, "two")
    assert claimed is not None
    await append(database, run_id, "after", generation=claimed.lease.generation)
    for reader in readers:
        await reader.has(2)
        assert not reader.task.done()


async def _value(number: int) -> int:
    return number


async def test_a_slow_reader_keeps_little_and_misses_nothing(
    database: Database, tails: Tails, readers: list[Reader]
) -> None:
    run_id = await make_run(database)
    await append(database, run_id, "0")
    slow, quick = Reader(tails, run_id), Reader(tails, run_id)
    readers += [slow, quick]
    await slow.has(1)
    slow.may_read.clear()
    await append(database, run_id, "1")
    await slow.has(2)
    [one] = tails._tails.values()
    for n in range(2, 60):
        await append(database, run_id, f"{n}" + "x" * 20_000)
        await quick.has(n + 1)
        assert one._kept_bytes == sum(len(batch.frames) for batch in one._kept.values()) <= TAIL_BYTES
    assert len(slow.texts) == 2
    slow.may_read.set()
    await slow.has(60)
    assert slow.texts == quick.texts
    await eventually(
        lambda: _value(one._kept_bytes), lambda n: n == 0, lambda n: f"end of {n} bytes that nobody needs"
    )


async def test_what_all_runs_keep_is_bounded(
    database: Database, tails: Tails, readers: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "KEPT_BYTES", 100_000)
    runs = [await make_run(database) for _ in range(8)]
    pairs = [(Reader(tails, run_id), Reader(tails, run_id)) for run_id in runs]
    readers += [reader for pair in pairs for reader in pair]
    for slow, _ in pairs:
        slow.may_read.clear()
    for run_id, (slow, quick) in zip(runs, pairs, strict=True):
        for n in range(3):
            await append(database, run_id, f"{n}" + "x" * 20_000)
            await quick.has(n + 1)
            assert 0 <= tails.kept_bytes == sum(one._kept_bytes for one in tails._tails.values()) <= 100_000
        assert len(slow.texts) == 1
    assert tails.kept_bytes > 0
    for slow, quick in pairs:
        slow.may_read.set()
        await slow.has(3)
        assert slow.texts == quick.texts
    for reader in readers:
        await reader.leave()
    assert tails.kept_bytes == 0


async def test_a_storage_that_hangs_holds_up_no_live_stream(
    database: Database, tails: Tails, record: Counting, readers: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    archived = [await make_run(database) for _ in range(12)]
    for run_id in archived:
        await append(database, run_id, "old")
        await database.execute(
            "UPDATE runs SET status = 'completed', completed_at = clock_timestamp() WHERE id = %(run)s",
            run=run_id,
        )
    objects: ObjectStore = record._objects

    async def archive() -> int:
        return await compaction.sweep(database, objects, 0.0)

    await eventually(archive, lambda n: n > 0, lambda n: f"archived run, {n}")
    answers, asked = asyncio.Event(), asyncio.Event()
    open_object = objects.open

    async def hang(key: str, *, start: int = 0) -> Content | None:
        asked.set()
        await answers.wait()
        return await open_object(key, start=start)

    monkeypatch.setattr(objects, "open", hang)
    old = [Reader(tails, run_id) for run_id in archived]
    readers += old
    await asyncio.wait_for(asked.wait(), DEADLINE_S)
    run_id = await make_run(database)
    live = Reader(tails, run_id)
    readers.append(live)
    await append(database, run_id, "now")
    await live.has(1)
    assert all(reader.texts == [] for reader in old)
    answers.set()
    for reader in old:
        await reader.has(1)


async def test_a_batch_is_bounded_by_bytes(database: Database, tails: Tails) -> None:
    run_id = await make_run(database, "completed")
    for _ in range(20):
        await append(database, run_id, *("y" * 9000 for _ in range(20)))
    frames = [chunk async for chunk in stream.frames(tails, run_id, after=0)]
    assert max(map(len, frames)) < store.PAGE_BYTES + 10_000
    assert sum(chunk.count(b"data: ") for chunk in frames) == 400


async def test_readers_outlast_the_database(
    database: Database, tails: Tails, record: Counting, readers: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await make_run(database)
    reader = Reader(tails, run_id, keepalive_s=0.05)
    readers.append(reader)
    await reader.beats(1)
    away = 3

    async def fail(run_id: UUID, after: int) -> Next:
        nonlocal away
        away -= 1
        if away >= 0:
            raise psycopg.OperationalError("server closed the connection")
        return await Record.next(record, run_id, after)

    monkeypatch.setattr(record, "next", fail)
    await append(database, run_id, "one")
    await reader.has(1)
    assert away < 0


async def test_a_bug_ends_the_stream_and_not_the_others(
    database: Database, tails: Tails, record: Counting, readers: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await make_run(database), await make_run(database)

    async def fail(run_id: UUID, after: int) -> Next:
        if run_id == one:
            raise ValueError("a bug")
        return await Record.next(record, run_id, after)

    monkeypatch.setattr(record, "next", fail)
    broken, whole = Reader(tails, one), Reader(tails, other)
    readers += [broken, whole]
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(broken.task, DEADLINE_S)
    await append(database, other, "fine")
    await whole.has(1)


async def test_the_stream_ends_when_a_dead_workers_lease_has_run_out(
    database: Database, tails: Tails, readers: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "CLEAN_UP_S", 0.05)
    run_id = await make_run(database, "failed")
    await database.execute(
        "UPDATE run_cursors SET leased_until = clock_timestamp() + interval '1 s' WHERE run_id = %(run)s",
        run=run_id,
    )
    reader = Reader(tails, run_id)
    readers.append(reader)
    await append(database, run_id, "cleaning up")
    await reader.has(1)
    assert not reader.task.done()
    await asyncio.wait_for(reader.task, DEADLINE_S)


async def test_nothing_is_left_of_readers_that_leave(database: Database, tails: Tails, hub: Hub) -> None:
    run_id = await make_run(database)
    left = [Reader(tails, run_id, after=n % 3) for n in range(30)]
    await append(database, run_id, "a", "b", "c", "d")
    for n, reader in enumerate(left):
        await reader.has(4 - n % 3)
    for reader in left:
        await reader.leave()
    assert tails._tails == {}
    assert hub._calls == {}


async def test_a_place_that_is_not_there_yet(
    database: Database, tails: Tails, record: Counting, readers: list[Reader]
) -> None:
    run_id = await make_run(database)
    readers.append(Reader(tails, run_id, after=2))
    await eventually(lambda: _value(record.reads), lambda reads: reads > 0, str)
    for text in "abc":
        await append(database, run_id, text)
    await readers[0].has(1)
    assert readers[0].texts == ["c"]


async def test_a_process_that_stops_ends_what_is_followed(database: Database, tails: Tails) -> None:
    run_id = await make_run(database)
    await append(database, run_id, "one")
    waiting, sending = Reader(tails, run_id), Reader(tails, run_id)
    sending.may_read.clear()
    for reader in (waiting, sending):
        await reader.has(1)
    tails.end()
    sending.may_read.set()
    late = Reader(tails, run_id)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(waiting.task, sending.task, late.task)
    assert late.frames == []
