"""Streams through a proxy that cuts connections at random: nothing lost, nothing repeated (run-lifecycle §7.2)."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID

import httpx
import pytest

from taskyard.client import AsyncTaskyard, Taskyard, following
from taskyard.client.sse import Parser
from taskyard.db.engine import Database
from taskyard.events import store
from taskyard.events.entries import Entry, Shown
from tests.support.cutting_proxy import Proxy, cutting_proxy
from tests.support.yard import DEADLINE_S, Run, Yard

RECONNECTS = 100
SEED = 20261125


def room(chance: random.Random) -> int | None:
    """Often in the middle of the head or of the first frames, sometimes far behind."""
    return chance.choice(
        (chance.randrange(1, 400), chance.randrange(200, 3000), chance.randrange(1000, 30_000))
    )


@pytest.fixture
async def proxy(yard: Yard) -> AsyncIterator[Proxy]:
    async with cutting_proxy(yard.url, room, SEED) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(following, "MAX_DELAY_S", 0.02)


async def talk(database: Database, run: Run, enough: Callable[[], bool]) -> None:
    """Say things until there were enough reconnects, then end the run."""
    chance = random.Random(SEED)
    number = 0
    async with asyncio.timeout(DEADLINE_S):
        while not enough():
            items = []
            for _ in range(chance.choice((1, 1, 3, 20))):
                number += 1
                text = "ü\u2028" * chance.choice((1, 10, 10, 400))
                shown = chance.choice((Shown.BOTH, Shown.STREAM, Shown.LOG))
                items.append(Entry(json.dumps({"type": "notification", "n": number, "text": text}), shown))
            async with database.connection() as connection:
                await store.append(connection, UUID(run.id), items)
            await asyncio.sleep(chance.choice((0, 0.005, 0.02)))
    await run.cancel()


async def by_raw_http(run: Run, key: str, proxy: Proxy) -> list[tuple[str | None, str]]:
    """Whole frames only, and `Last-Event-ID` of the last one, as any program may do it."""
    found: list[tuple[str | None, str]] = []
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    path = f"{proxy.url}/api/projects/@current/{run.path('stream/')}"
    while not (found and '"status": "cancelled"' in found[-1][1]):
        last = {"Last-Event-ID": found[-1][0] or ""} if found else {}
        parser = Parser()
        try:
            async with (
                httpx.AsyncClient(trust_env=False, timeout=DEADLINE_S) as client,
                client.stream("GET", path, headers=headers | last) as response,
            ):
                assert response.status_code == 200
                async for chunk in response.aiter_bytes():
                    found += [
                        (frame.id, frame.data) for frame in parser.feed(chunk) if frame.event == "message"
                    ]
        except httpx.TransportError:
            pass
    return found


async def by_async_client(run: Run, key: str, proxy: Proxy) -> list[tuple[str | None, str]]:
    async with AsyncTaskyard(proxy.url, key) as yard:
        return [
            (event.id, event.raw) async for event in yard.stream(run.task_id, run.id, max_failures=10_000)
        ]


async def by_blocking_client(run: Run, key: str, proxy: Proxy) -> list[tuple[str | None, str]]:
    def read() -> list[tuple[str | None, str]]:
        with Taskyard(proxy.url, key) as yard:
            return [(event.id, event.raw) for event in yard.stream(run.task_id, run.id, max_failures=10_000)]

    return await asyncio.to_thread(read)


@pytest.mark.parametrize("read", [by_raw_http, by_async_client, by_blocking_client])
async def test_a_hundred_cuts_lose_and_repeat_nothing(
    yard: Yard, proxy: Proxy, read: Callable[[Run, str, Proxy], Awaitable[list[tuple[str | None, str]]]]
) -> None:
    run = await yard.api().create_run()
    reading = asyncio.ensure_future(read(run, yard.keys["ada"], proxy))
    await talk(yard.database, run, lambda: proxy.cuts >= RECONNECTS or reading.done())
    async with asyncio.timeout(DEADLINE_S):
        found = await reading
    assert proxy.cuts >= RECONNECTS
    rows = await yard.database.fetch(
        "SELECT at_ms, seq, data FROM events WHERE run_id = %(run)s AND shown & 2 <> 0 ORDER BY seq",
        run=run.id,
    )
    assert found == [(f"{row['at_ms']}-{row['seq']}", row["data"]) for row in rows]
