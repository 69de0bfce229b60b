"""A run whose record was archived, driven again."""

from __future__ import annotations

from taskyard.events import compaction
from taskyard.objects.service import open_store
from tests.support.yard import Yard, eventually, ok, said


async def test_a_run_goes_on_after_its_record_was_archived(live: Yard) -> None:
    run = await live.api().start("SAY first", agent="scripted")
    await run.status("completed")
    frames, log = await run.stream(), await run.log()
    objects = await open_store(live.settings, live.database)

    async def sweep() -> int:
        return await compaction.sweep(live.database, objects, 0.0)

    await eventually(sweep, lambda n: n == 1, lambda n: f"archived run, {n}")
    ok(await run.api.post(run.path("resume_in_cloud/")))
    await run.command("user_message", content="SAY second")
    log_now = await run.turns(2)
    assert log_now[: len(log)] == log
    assert said(log_now).split("\n") == ["first", "second"], "the description was worked on once"
    await run.cancel()
    now = await run.stream()
    assert now[: len(frames)] == frames
    numbers = [int(id_.split("-")[1]) for id_, _ in now]
    assert numbers == sorted(set(numbers))
