"""Server-sent events of a run (run-lifecycle §7.2)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import UUID

import psycopg
import pytest

from taskyard.db.engine import Database
from taskyard.events import store, stream
from taskyard.events.entries import Entry, Shown
from taskyard.events.tail import Tails
from tests.support.rows import make_run


async def append(database: Database, run_id: UUID, *texts: str) -> None:
    async with database.connection() as connection:
        await store.append(connection, run_id, [Entry(json.dumps(text)) for text in texts])


async def end(database: Database, run_id: UUID) -> None:
    await database.execute("UPDATE runs SET status = 'completed' WHERE id = %(run)s", run=run_id)
    await database.execute("SELECT pg_notify('taskyard', 'e:' || %(run)s::text)", run=run_id)


async def next_frame(frames: AsyncIterator[bytes]) -> str:
    async with asyncio.timeout(30):
        return (await anext(frames)).decode()


async def test_frames_are_exact(database: Database, tails: Tails) -> None:
    run_id = await make_run(database)
    await append(database, run_id, "ä")
    [stored] = await store.read(database, run_id, Shown.STREAM, after=0, limit=1)
    frame = await next_frame(stream.frames(tails, run_id, after=0))
    assert frame == f'id: {stored.at_ms}-1\ndata: "\\u00e4"\n\n'


async def test_live_and_end(database: Database, tails: Tails) -> None:
    run_id = await make_run(database)
    frames = stream.frames(tails, run_id, after=0)
    waiting = asyncio.ensure_future(next_frame(frames))
    await append(database, run_id, "one")
    assert '"one"' in await waiting
    await append(database, run_id, "two")
    await end(database, run_id)
    assert '"two"' in await next_frame(frames)
    with pytest.raises(StopAsyncIteration):
        await next_frame(frames)


async def test_resume_skips_and_repeats_nothing(database: Database, tails: Tails) -> None:
    run_id = await make_run(database)
    await append(database, run_id, *(str(n) for n in range(1200)))
    await end(database, run_id)
    whole = "".join([f.decode() async for f in stream.frames(tails, run_id, after=0)]).split("\n\n")[:-1]
    assert len(whole) == 1200
    after = stream.position(whole[699].split("\n")[0].removeprefix("id: "))
    assert after is not None
    rest = "".join([f.decode() async for f in stream.frames(tails, run_id, after=after)]).split("\n\n")[:-1]
    assert rest == whole[700:]


async def test_who_is_not_allowed_any_more_is_sent_nothing(
    monkeypatch: pytest.MonkeyPatch, database: Database, tails: Tails
) -> None:
    """It is asked anew before what comes later than RECHECK_S; a database that is away ends no stream."""
    run_id = await make_run(database)
    answers: list[bool | Exception] = [True, psycopg.OperationalError("away"), True, False]

    async def allowed() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    frames = stream.frames(tails, run_id, after=0, allowed=allowed)
    await append(database, run_id, "at once")
    assert "at once" in await next_frame(frames)
    assert len(answers) == 4
    monkeypatch.setattr(stream, "RECHECK_S", -1.0)
    for text in ("one", "two", "three"):
        await append(database, run_id, text)
        assert text in await next_frame(frames)
    await append(database, run_id, "four")
    with pytest.raises(StopAsyncIteration):
        await next_frame(frames)
    assert answers == []


async def test_silence_is_broken_by_keepalives_without_id(database: Database, tails: Tails) -> None:
    run_id = await make_run(database)
    frames = stream.frames(tails, run_id, after=0, keepalive_s=0.05)
    assert await next_frame(frames) == 'event: keepalive\ndata: {"type":"keepalive"}\n\n'


async def test_an_ended_run_stays_open_while_a_worker_cleans_up(database: Database, tails: Tails) -> None:
    run_id = await make_run(database)
    await database.execute(
        "UPDATE run_cursors SET leased_until = now() + interval '1 hour' WHERE run_id = %(run)s", run=run_id
    )
    await end(database, run_id)
    frames = stream.frames(tails, run_id, after=0, keepalive_s=0.05)
    assert "keepalive" in await next_frame(frames)
    await append(database, run_id, "cleaned")
    assert "cleaned" in await next_frame(frames)


async def test_readers_survive_the_loss_of_the_notification_connection(
    database: Database, tails: Tails
) -> None:
    run_id = await make_run(database)
    frames = stream.frames(tails, run_id, after=0)
    waiting = asyncio.ensure_future(next_frame(frames))
    await asyncio.sleep(0)
    killed = await database.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query = 'LISTEN taskyard'"
    )
    assert killed
    await append(database, run_id, "still here")
    assert "still here" in await waiting


@pytest.mark.parametrize("text", ["", "x", "1", "1-", "-1", "1-2-3", "1-x", "9" * 40 + "-1", "１-２"])
def test_foreign_event_ids_name_no_position(text: str) -> None:
    assert stream.position(text) is None


def test_position() -> None:
    assert stream.position("1700000000000-42") == 42
