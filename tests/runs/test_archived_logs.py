"""Every call that reads a run's record answers the same, byte for byte, before and after its archiving."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from taskyard.db.engine import Database
from taskyard.events import compaction
from taskyard.objects.service import open_store
from taskyard.settings import ObjectSettings, Settings
from tests.support.s3 import s3_settings
from tests.support.yard import Json, Run, Yard, error, eventually, ok, open_yard


def note(kind: str, second: int, **extra: Any) -> Json:
    params = {"sessionId": "s", "update": {"sessionUpdate": kind, **extra}}
    message = {"jsonrpc": "2.0", "method": "session/update", "params": params}
    return {"type": "notification", "timestamp": f"2026-05-20T10:00:{second:02}.5Z", "notification": message}


@pytest.fixture(params=["local", "s3"])
async def site(request: pytest.FixtureRequest, settings: Settings, database: Database) -> AsyncIterator[Yard]:
    if request.param == "s3":
        url = request.getfixturevalue("s3_url")
        settings = settings.model_copy(update={"objects": ObjectSettings(s3=s3_settings(url))})
    async with open_yard(settings, database) as yard:
        yield yard


async def archive(yard: Yard, count: int) -> None:
    """Archive what has ended; as if an hour had gone by."""
    objects = await open_store(yard.settings, yard.database)

    async def sweep() -> int:
        return await compaction.sweep(yard.database, objects, 0.0)

    assert await eventually(sweep, lambda n: n > 0, lambda n: f"archived run, {n}") == count
    await objects.close()


async def ingest_token(run: Run) -> str:
    answer = ok(
        await run.api.get(run.path("connection_token/"), params={"audience": "posthog:sandbox_event_ingest"})
    )
    return str(answer["token"])


async def two_runs(yard: Yard) -> tuple[Run, Run]:
    """A run with a log and events of all kinds that was ended, and one that resumes it."""
    api = yard.api()
    first = await api.create_run()
    for n in range(30):
        await first.append(
            *(
                note(("agent_message", "tool_call", "plan")[n % 3], n, n=k, text="ü\u2028" * k)
                for k in range(20)
            )
        )
        await first.patch(stage=f"s{n}", output={"n": n})
    lines = "\n".join(f'{{"seq": {n}, "event": {{"type": "x", "n": {n}}}}}' for n in range(1, 200))
    headers = {"Authorization": f"Bearer {await ingest_token(first)}"}
    ok(
        await yard.client.post(
            f"/api/projects/@current/{first.path('event_stream/')}", content=lines, headers=headers
        )
    )
    await first.patch(status="completed")
    task = ok(await api.get(f"tasks/{first.task_id}/"))
    second = await api.create_run(task)
    await yard.database.execute(
        "UPDATE runs SET state = jsonb_build_object('resume_from_run_id', %(first)s::text) WHERE id = %(second)s",
        first=first.id,
        second=second.id,
    )
    await second.append(note("agent_message", 59, text="second"))
    return first, second


async def answers(yard: Yard, first: Run, second: Run, ids: list[str], log_url: str) -> list[object]:
    def shown(response: httpx.Response) -> object:
        assert response.status_code == 200, response.text
        headers = {name: value for name, value in response.headers.items() if name.startswith("x-")}
        return response.content, response.headers["content-type"], headers

    found = [shown(await run.api.get(run.path("logs/"))) for run in (first, second)]
    found.append(shown(await yard.client.get(log_url)))
    for query in (
        {}, {"limit": 7, "offset": 311}, {"event_types": "tool_call,plan", "limit": 5000}, {"exclude_types": "plan"},
        {"after": "2026-05-20T10:00:17.5Z"}, {"after": "2026-05-20T10:00:17.499999Z", "event_types": "agent_message"},
        {"event_types": "none"}, {"offset": 100_000},
    ):  # fmt: skip
        found.append(shown(await first.api.get(first.path("session_logs/"), params=query)))
    for headers in ({}, *({"Last-Event-ID": one} for one in ids)):
        found.append(shown(await first.api.get(first.path("stream/"), headers=headers)))
    found.append(shown(await first.api.get(first.path("stream/"), params={"start": "latest"})))
    found.append(await first.fetch() | {"log_url": None})
    return found


async def test_every_call_answers_the_same(site: Yard) -> None:
    first, second = await two_runs(site)
    ids = [id_ for id_, _ in await first.stream()]
    some = [ids[0], ids[1], ids[40], ids[-2], ids[-1]]
    log_url = (await first.fetch())["log_url"]
    before = await answers(site, first, second, some, log_url)
    await archive(site, 1)
    assert await site.database.fetch("SELECT 1 FROM events WHERE run_id = %(run)s", run=first.id) == []
    assert await answers(site, first, second, some, log_url) == before


async def test_what_comes_afterwards_follows(site: Yard) -> None:
    first, second = await two_runs(site)
    frames, log, last = await first.stream(), await first.log(), len(await second.log())
    await archive(site, 1)
    late = note("plan", 1, late=True)
    await first.append(late)
    await first.patch(output={"late": True})
    assert await first.log() == [*log, late]
    assert len(await second.log()) == last + 1
    now = await first.stream()
    assert now[:-1] == frames
    assert now[-1][1]["output"] == {"n": 29, "late": True}
    assert await first.stream(frames[-1][0]) == now[-1:]
    await archive(site, 1)
    assert (await first.stream(), await first.log()) == (now, [*log, late])


async def test_a_run_that_is_started_again_counts_on(site: Yard) -> None:
    first, _ = await two_runs(site)
    frames = await first.stream()
    await archive(site, 1)
    ok(await first.api.post(first.path("resume_in_cloud/")))
    await first.append(note("agent_message", 2, text="again"))
    await first.cancel()
    now = await first.stream()
    assert now[: len(frames)] == frames
    assert [event["status"] for _, event in now[len(frames) :]] == ["queued", "cancelled"]
    numbers = [int(id_.split("-")[1]) for id_, _ in now]
    assert numbers == sorted(set(numbers))
    assert (await first.log())[-1] == note("agent_message", 2, text="again")
    await archive(site, 1)
    assert await first.stream() == now


async def test_a_lost_object_is_an_error_before_the_first_byte(
    settings: Settings, database: Database
) -> None:
    async with open_yard(settings, database) as yard:
        first, second = await two_runs(yard)
        log_url = (await first.fetch())["log_url"]
        await archive(yard, 1)
        objects = await open_store(settings, database)
        [row] = await database.fetch("SELECT key FROM archived_events")
        await objects.delete([row["key"]])
        await objects.close()
        for answer in (
            await first.api.get(first.path("logs/")),
            await second.api.get(second.path("logs/")),
            await first.api.get(first.path("session_logs/")),
            await first.api.get(first.path("session_logs/"), params={"event_types": "plan"}),
            await yard.client.get(log_url),
        ):
            assert "backup" in error(answer, 503, "unavailable")["detail"]
