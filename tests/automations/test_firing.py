"""What a schedule does: one run a firing, catching up, and when it stops. The time is given, not waited for."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from taskyard.automations import clock, service, store
from taskyard.db.engine import Database
from taskyard.runs import service as runs
from tests.support.yard import Json, Yard, eventually, ok

AGENTS = frozenset({"claude"})


class Automation:
    """One automation, and its schedule as it stands in the database."""

    def __init__(self, yard: Yard, body: Json) -> None:
        self.yard = yard
        self.id: str = body["id"]
        self.task_id: str = body["last_task_id"]
        self.path = f"task_automations/{self.id}/"

    async def shown(self) -> Json:
        return ok(await self.yard.api().get(self.path))

    async def change(self, **fields: Any) -> Json:
        return ok(await self.yard.api().patch(self.path, fields))

    async def due(self) -> datetime:
        row = await self.yard.database.fetch_one(
            "SELECT next_run_at FROM task_automations WHERE id = %(id)s", id=self.id
        )
        assert row is not None
        assert row["next_run_at"] is not None
        at: datetime = row["next_run_at"]
        return at

    async def runs(self) -> list[Json]:
        return list(ok(await self.yard.api().get(f"tasks/{self.task_id}/runs/"))["results"])

    async def end_last(self, status: str, error_message: str | None = None) -> None:
        run = (await self.runs())[0]
        body = {"status": status, "error_message": error_message}
        ok(await self.yard.api().patch(f"tasks/{self.task_id}/runs/{run['id']}/", body))

    async def fire(self) -> int:
        return await service.fire_due(self.yard.database, AGENTS, await self.due())


async def make(yard: Yard, key: str = "ada", **fields: Any) -> Automation:
    body = {
        "name": "Hourly", "prompt": "Do it", "repository": "acme/demo", "cron_expression": "0 * * * *", **fields
    }  # fmt: skip
    return Automation(yard, ok(await yard.api(key).post("task_automations/", body), 201))


async def test_a_firing_makes_one_run(yard: Yard) -> None:
    automation = await make(yard)
    due = await automation.due()
    assert (due.minute, due.second) == (0, 0)
    assert await service.fire_due(yard.database, AGENTS, due - timedelta(seconds=1)) == 0
    assert await service.fire_due(yard.database, AGENTS, due) == 1
    assert await service.fire_due(yard.database, AGENTS, due + timedelta(minutes=1)) == 0
    [run] = await automation.runs()
    assert (run["status"], run["state"]["automation_id"]) == ("queued", automation.id)
    shown = await automation.shown()
    assert (shown["last_task_run_id"], shown["last_run_status"]) == (run["id"], "running")
    assert await automation.due() == due + timedelta(hours=1)
    row = await yard.database.fetch_one("SELECT created_by_id FROM runs")
    assert row == {"created_by_id": yard.users["ada"]}


async def test_many_workers_make_one_run_each(yard: Yard, database_url: str) -> None:
    automations = [await make(yard, name=str(n)) for n in range(5)]
    due = await automations[0].due()
    workers = [Database(database_url, max_connections=2) for _ in range(4)]
    for worker in workers:
        await worker.open()
    try:
        for hour in range(3):
            now = due + timedelta(hours=hour)
            counts = await asyncio.gather(
                *(service.fire_due(worker, AGENTS, now) for worker in workers for _ in range(2))
            )
            assert sum(counts) == 5
    finally:
        for worker in workers:
            await worker.close()
    for automation in automations:
        assert len(await automation.runs()) == 3
        assert await automation.due() == due + timedelta(hours=3)


async def test_catching_up(yard: Yard) -> None:
    automation = await make(yard, cron_expression="* * * * *")
    due = await automation.due()
    # Five minutes late is in time, and what was missed in between is not made up for.
    assert await service.fire_due(yard.database, AGENTS, due + timedelta(minutes=5)) == 1
    assert await automation.due() == due + timedelta(minutes=6)
    # After a long outage the newest of those that were missed is still in time.
    assert await service.fire_due(yard.database, AGENTS, due + timedelta(minutes=31, seconds=1)) == 1
    assert await automation.due() == due + timedelta(minutes=32)
    assert (await automation.shown())["last_error"] is None
    assert len(await automation.runs()) == 2


async def test_too_late(yard: Yard) -> None:
    automation = await make(yard)
    missed = await automation.due()
    late = missed + timedelta(hours=2, minutes=5, seconds=1)
    assert await service.fire_due(yard.database, AGENTS, late) == 0
    assert await automation.due() == missed + timedelta(hours=3)
    shown = await automation.shown()
    assert shown["last_error"] == (
        f"The run of {missed:%Y-%m-%d %H:%M} UTC was skipped: no worker was running then."
    )
    assert shown["enabled"] is True
    assert await automation.fire() == 1
    assert (await automation.shown())["last_error"] is None
    assert len(await automation.runs()) == 1


async def test_the_same_schedule_again_leaves_a_due_firing(yard: Yard) -> None:
    """Whoever saves a form at this moment sends all of it."""
    automation = await make(yard)
    await yard.database.execute("UPDATE task_automations SET next_run_at = clock_timestamp()")
    due = await automation.due()
    same = {"cron_expression": "0 * * * *", "timezone": "UTC", "enabled": True}
    await automation.change(name="Another", **same)
    assert await automation.due() == due
    await automation.change(**same | {"timezone": "Asia/Kathmandu"})
    assert await automation.due() > due


async def test_disabled_and_deleted_ones_do_not_fire(yard: Yard) -> None:
    off, gone = await make(yard), await make(yard)
    due = await off.due()
    await off.change(enabled=False)
    await yard.api().request("DELETE", gone.path)
    assert await service.fire_due(yard.database, AGENTS, due) == 0


async def test_one_that_is_being_changed_waits(yard: Yard) -> None:
    automation = await make(yard)
    due = await automation.due()
    async with yard.database.transaction() as connection:
        await connection.execute("SELECT 1 FROM task_automations FOR UPDATE")
        assert await service.fire_due(yard.database, AGENTS, due) == 0
    assert await service.fire_due(yard.database, AGENTS, due) == 1


async def test_paused_after_five_failed_runs(yard: Yard) -> None:
    automation = await make(yard)
    for n in range(5):
        assert await service.pause_failing(yard.database) == 0
        await automation.fire()
        await automation.end_last("failed", f"Broken {n}")
    assert (await automation.shown())["enabled"] is True
    assert await service.pause_failing(yard.database) == 1
    shown = await automation.shown()
    assert (shown["enabled"], shown["last_run_status"]) == (False, "failed")
    assert shown["last_error"] == "Paused after 5 failed runs in a row. The last one: Broken 4"
    assert await service.pause_failing(yard.database) == 0
    # Enabled again, it gets five new chances.
    shown = await automation.change(enabled=True)
    assert (shown["enabled"], shown["last_error"]) == (True, "Broken 4")
    for _ in range(4):
        await automation.fire()
        await automation.end_last("failed")
    assert await service.pause_failing(yard.database) == 0
    await automation.fire()
    await automation.end_last("failed")
    assert await service.pause_failing(yard.database) == 1
    assert (await automation.shown())["last_error"] == "Paused after 5 failed runs in a row."


@pytest.mark.parametrize(("status", "paused"), [("completed", 0), ("cancelled", 1)])
async def test_what_breaks_a_row_of_failures(yard: Yard, status: str, paused: int) -> None:
    """A success does. A cancelled run is nobody's failure and nobody's success."""
    automation = await make(yard)
    for end in ("failed", "failed", status, "failed", "failed", "failed"):
        await automation.fire()
        await automation.end_last(end)
    assert await service.pause_failing(yard.database) == paused


@pytest.mark.parametrize("newest", ["queued", "cancelled"])
async def test_paused_although_the_newest_run_did_not_fail(yard: Yard, newest: str) -> None:
    """A schedule that is quicker than its runs always has one under way."""
    automation = await make(yard)
    for n in range(5):
        await automation.fire()
        await automation.end_last("failed", f"Broken {n}")
    await automation.fire()
    if newest != "queued":
        await automation.end_last(newest)
    assert await service.pause_failing(yard.database) == 1
    shown = await automation.shown()
    assert shown["last_error"] == "Paused after 5 failed runs in a row. The last one: Broken 4"


async def test_only_its_own_runs_count(yard: Yard) -> None:
    automation, other = await make(yard), await make(yard)
    for _ in range(4):
        await automation.fire()
        await automation.end_last("failed")
    started = ok(await yard.api().post(f"tasks/{automation.task_id}/run/"))
    path = f"tasks/{automation.task_id}/runs/{started['latest_run']['id']}/"
    ok(await yard.api().patch(path, {"status": "failed"}))
    assert await service.pause_failing(yard.database) == 0
    assert (await other.shown())["enabled"] is True


async def test_creator_who_left(yard: Yard) -> None:
    """A run that cannot be started is a failure too, and the others are not held up by it."""
    left, fine = await make(yard, "bob", name="a"), await make(yard, name="b")
    await yard.database.execute("DELETE FROM memberships WHERE user_id = %(user)s", user=yard.users["bob"])
    first = await left.due()
    for n in range(1, 6):
        now = await left.due()
        assert await service.fire_due(yard.database, AGENTS, now) == 1
        assert len(await fine.runs()) == n
        shown = await left.shown()
        assert shown["enabled"] is (n < 5)
        problem = (
            f"The run of {now:%Y-%m-%d %H:%M} UTC could not be started: "
            "whoever made this automation is no longer a member of the project."
        )
        paused = "" if n < 5 else "Paused after 5 failures in a row. "
        assert shown["last_error"] == paused + problem
        assert (shown["last_task_run_id"], shown["last_run_status"]) == (None, None)
        assert now == first + timedelta(hours=n - 1)
    assert await left.runs() == []
    # Somebody else may still run it, and that clears the error.
    assert ok(await yard.api().post(left.path + "run/"))["last_error"] is None


async def test_deleted_task_pauses(yard: Yard) -> None:
    automation = await make(yard)
    await yard.api().request("DELETE", f"tasks/{automation.task_id}/")
    assert await automation.fire() == 0
    shown = await automation.shown()
    assert (shown["enabled"], shown["last_error"]) == (
        False,
        "Paused: the task of this automation was deleted.",
    )


async def test_schedule_that_cannot_be_read_any_more(yard: Yard) -> None:
    automation, fine = await make(yard), await make(yard)
    await yard.database.execute(
        "UPDATE task_automations SET timezone = 'Atlantis/Main' WHERE id = %(id)s", id=automation.id
    )
    assert await automation.fire() == 1
    shown = await automation.shown()
    assert shown["enabled"] is False
    assert shown["last_error"].startswith("Paused: the schedule cannot be read any more: ")
    assert len(await fine.runs()) == 1


async def test_a_bug_of_ours_does_not_hold_up_the_others(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, fine = await make(yard, name="a"), await make(yard, name="b")
    start = runs.run_task

    async def fail_one(connection: Any, caller: Any, task_id: Any, *rest: Any, **more: Any) -> Any:
        row = await start(connection, caller, task_id, *rest, **more)
        if str(task_id) == broken.task_id:
            raise ZeroDivisionError
        return row

    monkeypatch.setattr(runs, "run_task", fail_one)
    assert await broken.fire() == 1
    shown = await broken.shown()
    assert shown["last_error"].endswith("Internal error: ZeroDivisionError. See the server's log.")
    # What the failed start had written is gone.
    assert await broken.runs() == []
    assert len(await fine.runs()) == 1


async def test_the_clock(yard: Yard) -> None:
    """The worker's loop: what is due fires, what fails too often is paused."""
    yearly = "0 3 1 1 *"
    automation = await make(yard, cron_expression=yearly)
    failing = await make(yard, cron_expression=yearly)
    for _ in range(5):
        ok(await yard.api().post(failing.path + "run/"))
        await failing.end_last("failed")
    await yard.database.execute(
        "UPDATE task_automations SET next_run_at = clock_timestamp() WHERE id = %(id)s", id=automation.id
    )
    loop = asyncio.create_task(clock.keep(yard.database, AGENTS))
    try:
        await eventually(automation.runs, lambda found: len(found) == 1, lambda found: f"run: {found}")
        await eventually(failing.shown, lambda shown: not shown["enabled"], lambda shown: f"pause: {shown}")
    finally:
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop
    assert await automation.due() > datetime.now(UTC)
    assert await store.next_due(yard.database) == await automation.due()
