"""Moving the records of ended runs into objects, and removing old ones."""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
import structlog

from taskyard.artifacts import retention
from taskyard.db.engine import Database
from taskyard.events import archive, archive_store, compaction, log, store
from taskyard.events.archive import Item
from taskyard.events.entries import Entry, Filter, Shown
from taskyard.events.record import Record
from taskyard.objects.interface import ObjectStore, StorageError
from tests.support.rows import make_run

SOON = 0.0
DAY = 86_400


async def append(database: Database, run_id: UUID, *items: Entry) -> int:
    async with database.connection() as connection:
        return await store.append(connection, run_id, items)


async def end(database: Database, run_id: UUID) -> None:
    await database.execute(
        "UPDATE runs SET status = 'completed', completed_at = clock_timestamp() WHERE id = %(run)s",
        run=run_id,
    )
    await asyncio.sleep(0.002)  # times of entries are whole milliseconds


async def ended_run(database: Database, items: Sequence[Entry]) -> UUID:
    run_id = await make_run(database)
    for start in range(0, len(items), 1000):
        await append(database, run_id, *items[start : start + 1000])
    await end(database, run_id)
    return run_id


def mixed(count: int, text: str = "") -> list[Entry]:
    """Entries of all kinds: with and without a time and a kind, for the log, the stream, and both."""
    return [
        Entry(
            json.dumps(
                {"n": n, "text": text + "ü\u2028\U0001f600\x00" * (n % 7)}, ensure_ascii=n % 2 == 0
            ).replace("\x00", ""),
            Shown(1 + n % 3),
            ("", "agent_message", "x", "ü")[n % 4],
            None
            if n % 5 == 0
            else datetime(2026, 1, 1, 0, n // 60 % 60, n % 60, 123456 + n % 100, tzinfo=UTC),
        )
        for n in range(count)
    ]


async def in_table(database: Database, run_id: UUID) -> int:
    row = await database.fetch_one("SELECT count(*) AS n FROM events WHERE run_id = %(run)s", run=run_id)
    assert row is not None
    return int(row["n"])


async def key_of(database: Database, run_id: UUID) -> str:
    row = await database.fetch_one("SELECT key FROM archived_events WHERE run_id = %(run)s", run=run_id)
    assert row is not None
    return str(row["key"])


FILTERS = [
    Filter(),
    Filter(after=datetime(2026, 1, 1, 0, 3, 7, 123463, tzinfo=UTC)),
    Filter(kinds=["agent_message", "ü"]),
    Filter(without=["x", ""]),
    Filter(after=datetime(1, 1, 1, tzinfo=UTC), kinds=["x"], without=["y"]),
    Filter(kinds=["none"]),
]


async def everything(record: Record, run_id: UUID) -> list[object]:
    """What every way of reading gives, in pieces that do not show where they were cut."""
    found: list[object] = [b"".join([part async for part in log.lines(record, [run_id])])]
    for wanted in FILTERS:
        counts = await record.count(run_id, wanted)
        found.append((counts.total, counts.matching))
        for limit, offset in ((1, 0), (5000, 0), (7, 3), (300, 249), (250, 250), (10, 100_000)):
            pages = record.pages(run_id, Shown.LOG, wanted, last=counts.last, limit=limit, offset=offset)
            found.append([text async for page in pages for text in page])
    for after in (0, 1, 2, 299, 300, 601, 1000, 5000):
        frames, last = [], after
        while (step := await record.next(run_id, last)).items or not step.over:
            frames += step.items
            last = step.last
        found.append(frames)
    found.append(await record.has_log(run_id))
    return found


async def test_every_way_of_reading_gives_the_same(
    database: Database, objects: ObjectStore, record: Record
) -> None:
    run_id = await ended_run(database, mixed(1500, "some text " * 60))
    other = await ended_run(database, mixed(3))
    before, others = await everything(record, run_id), await everything(record, other)
    assert await compaction.sweep(database, objects, SOON) == 2
    assert await in_table(database, run_id) == await in_table(database, other) == 0
    row = await database.fetch_one(
        "SELECT cardinality(block_seqs) AS n FROM archived_events WHERE run_id = %(run)s", run=run_id
    )
    assert row is not None
    assert row["n"] > 3
    assert await everything(record, run_id) == before
    assert await everything(record, other) == others
    assert await compaction.sweep(database, objects, SOON) == 0


async def test_what_comes_after_the_end_is_read_and_archived_too(
    database: Database, objects: ObjectStore, record: Record
) -> None:
    entries = mixed(1600, "text " * 30)
    run_id = await ended_run(database, entries)
    before = await everything(record, run_id)
    await database.execute("DELETE FROM events WHERE run_id = %(run)s AND seq > 700", run=run_id)
    await database.execute("UPDATE run_cursors SET last_seq = 700 WHERE run_id = %(run)s", run=run_id)
    await compaction.sweep(database, objects, SOON)
    first = await key_of(database, run_id)
    for start, stop in ((700, 1100), (1100, 1600)):
        assert await append(database, run_id, *entries[start:stop]) == stop
        mixed_up = await everything(record, run_id)
        await asyncio.sleep(0.002)
        assert await compaction.sweep(database, objects, SOON) == 1
        assert await everything(record, run_id) == mixed_up
    assert await in_table(database, run_id) == 0
    # All but the times of the entries that were appended later.
    assert [one for one in mixed_up if not _has_times(one)] == [one for one in before if not _has_times(one)]
    assert await key_of(database, run_id) != first
    assert await objects.head(first) is not None, "somebody may still read it"
    await database.execute("UPDATE stored_objects SET keep_until = keep_until - interval '25 hours'")
    assert await retention.sweep(database, objects) == 2
    assert await objects.head(first) is None
    assert await everything(record, run_id) == mixed_up


def _has_times(one: object) -> bool:
    return isinstance(one, list) and bool(one) and isinstance(one[0], store.Stored)


async def test_the_object_can_be_read_without_us(database: Database, objects: ObjectStore) -> None:
    entries = mixed(50)
    run_id = await ended_run(database, entries)
    await compaction.sweep(database, objects, SOON)
    content = await objects.open(await key_of(database, run_id))
    assert content is not None
    lines = gzip.decompress(b"".join([chunk async for chunk in content.chunks])).decode().split("\n")
    assert [json.loads(line)[5] for line in lines if line] == [entry.data for entry in entries]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE runs SET status = 'in_progress'",
        "UPDATE runs SET completed_at = clock_timestamp() - interval '50 minutes'",
        "UPDATE run_cursors SET leased_until = clock_timestamp() + interval '5 minutes'",
        "UPDATE run_cursors SET last_ms = (extract(epoch FROM clock_timestamp()) - 3000) * 1000",
    ],
    ids=["going on", "just ended", "held by a worker", "just written to"],
)
async def test_what_is_not_quiet_stays(database: Database, objects: ObjectStore, change: str) -> None:
    run_id = await ended_run(database, mixed(3))
    for table in (
        "runs SET completed_at = completed_at - interval '2 h'",
        "run_cursors SET last_ms = last_ms - 7200000",
    ):
        await database.execute(f"UPDATE {table}")
    await database.execute(change)
    assert await compaction.sweep(database, objects, 3600) == 0
    assert await in_table(database, run_id) == 3


async def test_a_run_that_is_started_meanwhile_keeps_its_entries(
    database: Database, objects: ObjectStore, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await ended_run(database, mixed(30))
    before = await everything(record, run_id)
    put = objects.put_file

    async def slow(key: str, path: Path, content_type: str) -> None:
        await put(key, path, content_type)
        await database.execute("UPDATE runs SET status = 'queued' WHERE id = %(run)s", run=run_id)

    monkeypatch.setattr(objects, "put_file", slow)
    assert await compaction.sweep(database, objects, SOON) == 0
    assert await in_table(database, run_id) == 30
    await end(database, run_id)
    assert await everything(record, run_id) == before
    await database.execute("UPDATE stored_objects SET keep_until = keep_until - interval '25 hours'")
    assert await retention.sweep(database, objects) == 1, "the object of the try is removed"


async def test_a_crash_at_any_step_loses_nothing(
    database: Database, objects: ObjectStore, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await ended_run(database, mixed(300))
    before = await everything(record, run_id)
    for module, name in ((objects, "put_file"), (objects, "head"), (archive_store, "swap")):
        with monkeypatch.context() as broken:

            async def fail(*_: object) -> None:
                raise StorageError

            broken.setattr(module, name, fail)
            with pytest.raises(StorageError):
                await compaction.sweep(database, objects, SOON)
        assert await everything(record, run_id) == before
    assert await compaction.sweep(database, objects, SOON) == 1
    assert await everything(record, run_id) == before


@pytest.mark.parametrize("error", [StorageError, OSError])
async def test_a_run_that_cannot_be_archived_does_not_hold_up_others(
    database: Database, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    runs = [await ended_run(database, mixed(5)) for _ in range(5)]
    sick = set(sorted(runs)[:2])
    tried: list[UUID] = []
    put_file = objects.put_file

    async def put(key: str, path: Path, content_type: str) -> None:
        tried.append(UUID(key.split("/")[1]))
        if tried[-1] in sick:
            raise error
        await put_file(key, path, content_type)

    monkeypatch.setattr(objects, "put_file", put)
    with pytest.raises(error):
        await compaction.sweep(database, objects, SOON)
    assert {run for run in runs if await in_table(database, run)} == sick
    # Where nothing works any more, no more than a few are tried.
    runs += [await ended_run(database, mixed(5)) for _ in range(6)]
    sick = set(runs)
    tried.clear()
    with pytest.raises(error):
        await compaction.sweep(database, objects, SOON)
    assert len(tried) == compaction.AWAY_AFTER


async def test_nothing_lies_around_while_a_record_is_written(
    database: Database, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed cannot remove its temporary file: so that has no name."""
    await ended_run(database, mixed(50))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    put_file, seen = objects.put_file, []

    async def put(key: str, path: Path, content_type: str) -> None:
        seen.append((list(folder.iterdir()), len(path.read_bytes()) > 0))
        await put_file(key, path, content_type)

    monkeypatch.setattr(objects, "put_file", put)
    assert await compaction.sweep(database, objects, SOON) == 1
    assert seen == [([], True)]


async def test_an_object_that_was_cut_short_is_not_trusted(
    database: Database, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await ended_run(database, mixed(30))

    async def cut(key: str, path: Path, content_type: str) -> None:
        await objects.put(key, path.read_bytes()[:-1], content_type)

    monkeypatch.setattr(objects, "put_file", cut)
    with pytest.raises(StorageError):
        await compaction.sweep(database, objects, SOON)
    assert await in_table(database, run_id) == 30


async def test_two_workers_at_once(database: Database, objects: ObjectStore, record: Record) -> None:
    run_id = await ended_run(database, mixed(900, "text " * 50))
    before = await everything(record, run_id)
    done = await asyncio.gather(*(compaction.sweep(database, objects, SOON) for _ in range(3)))
    assert sum(done) == 1
    assert await everything(record, run_id) == before


async def test_a_reader_that_is_overtaken_goes_on_in_the_archive(
    database: Database, objects: ObjectStore, record: Record
) -> None:
    entries = mixed(2000, "text " * 30)
    run_id = await ended_run(database, entries)
    expected = [entry.data for entry in entries if entry.shown & Shown.LOG]
    pages = record.pages(run_id, Shown.LOG)
    texts = await anext(pages)
    await compaction.sweep(database, objects, SOON)
    texts += [text async for page in pages for text in page]
    assert texts == expected
    pages = record.pages(run_id, Shown.LOG)
    texts = await anext(pages)
    await append(database, run_id, Entry('"late"'))
    await asyncio.sleep(0.002)
    await compaction.sweep(database, objects, SOON)
    texts += [text async for page in pages for text in page]
    assert texts == [*expected, '"late"']


@pytest.mark.parametrize("late", [Shown.STREAM, Shown.LOG])
async def test_a_stream_does_not_wait_behind_an_archive_that_has_nothing_for_it(
    database: Database, objects: ObjectStore, record: Record, late: Shown
) -> None:
    run_id = await ended_run(database, [Entry('"first"', Shown.STREAM), Entry('"second"', Shown.LOG)])
    await compaction.sweep(database, objects, SOON)
    last = await append(database, run_id, Entry('"late"', late))
    # Whoever gets nothing, and no end either, waits for a notification: of what is there already comes none.
    step = await record.next(run_id, 1)
    assert [item.data for item in step.items] == (['"late"'] if late is Shown.STREAM else [])
    assert (step.last, step.over) == (last, True)


async def test_a_long_log_is_never_in_memory_as_a_whole(
    database: Database, objects: ObjectStore, record: Record
) -> None:
    big = Entry(json.dumps("y" * 900_000))
    run_id = await ended_run(database, [big] * 12)
    assert [len(page) async for page in record.pages(run_id, Shown.LOG)] == [1] * 12
    assert len((await record.next(run_id, 0)).items) == 1
    await compaction.sweep(database, objects, SOON)
    assert [len(page) async for page in record.pages(run_id, Shown.LOG)] == [1] * 12
    assert len((await record.next(run_id, 0)).items) == 1


async def test_a_lost_object_is_an_error_and_not_an_empty_log(
    database: Database, objects: ObjectStore, record: Record
) -> None:
    run_id = await ended_run(database, mixed(5))
    await compaction.sweep(database, objects, SOON)
    await objects.delete([await key_of(database, run_id)])
    with pytest.raises(archive.ArchiveLostError):
        [part async for part in log.lines(record, [run_id])]
    await append(database, run_id, Entry('"late"'))
    await asyncio.sleep(0.002)
    with structlog.testing.capture_logs() as logs:
        assert await compaction.sweep(database, objects, SOON) == 0
    assert logs[0]["event"] == "cannot archive the log of a run"
    assert await in_table(database, run_id) == 1


async def test_who_has_talked_is_known_of_archived_runs(database: Database, objects: ObjectStore) -> None:
    talked = await ended_run(database, [Entry("{}", Shown.BOTH, "agent_message")])
    silent = await ended_run(database, [Entry("{}", Shown.BOTH, "console")])
    for _ in range(2):
        assert await store.has_turns(database, talked)
        assert not await store.has_turns(database, silent)
        await compaction.sweep(database, objects, SOON)
    await append(database, talked, Entry("{}"))
    await asyncio.sleep(0.002)
    assert await compaction.sweep(database, objects, SOON) == 1
    assert await store.has_turns(database, talked)


async def test_old_records_are_removed(database: Database, objects: ObjectStore, record: Record) -> None:
    old, young, beside = [await ended_run(database, mixed(5)) for _ in range(3)]
    await compaction.sweep(database, objects, SOON)
    keys = {run_id: await key_of(database, run_id) for run_id in (old, young, beside)}
    await database.execute("UPDATE archived_events SET last_ms = last_ms - 40 * 86400000::bigint")
    await database.execute("UPDATE run_cursors SET last_ms = last_ms - 40 * 86400000::bigint")
    await database.execute(
        "UPDATE runs SET updated_at = updated_at - interval '40 days', completed_at = completed_at - interval '40 days'"
    )
    await database.execute("UPDATE runs SET updated_at = clock_timestamp() WHERE id = %(run)s", run=young)
    await database.execute(
        "INSERT INTO runs (task_id, project_id, status, environment) SELECT task_id, project_id, 'queued', 'cloud'"
        " FROM runs WHERE id = %(run)s",
        run=beside,
    )
    assert await compaction.remove(database, 41 * DAY) == 0
    assert await compaction.remove(database, 30 * DAY) == 1
    assert not await record.has_log(old)
    assert await record.has_log(young)
    assert await record.has_log(beside)
    assert [part async for part in log.lines(record, [old])] == []
    assert (await record.next(old, 0)).over
    await database.execute("UPDATE stored_objects SET keep_until = keep_until - interval '25 hours'")
    assert await retention.sweep(database, objects) == 1
    assert [await objects.head(keys[run_id]) is not None for run_id in (old, young, beside)] == [
        False,
        True,
        True,
    ]


async def test_a_record_whose_run_is_being_started_is_not_removed(
    database: Database, objects: ObjectStore, record: Record
) -> None:
    run_id = await ended_run(database, mixed(5))
    await compaction.sweep(database, objects, SOON)
    await asyncio.sleep(0.01)
    async with database.transaction() as connection:
        await connection.execute(
            "UPDATE runs SET status = 'queued', completed_at = NULL WHERE id = %(run)s", {"run": run_id}
        )
        assert await compaction.remove(database, 0.001) == 0
    assert await compaction.remove(database, 0.001) == 0
    assert await record.has_log(run_id)


def test_blocks_keep_every_text() -> None:
    items = [
        Item(1, 2, 3, None, None, 'a\n"\\\u2028\x7f\U0001f600'),
        Item(2, 2, 1, "k", -62_135_596_800_000_001, ""),
    ]
    assert archive.unpack(archive.pack(items)) == items
