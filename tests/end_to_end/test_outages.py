"""What is lost on the way between workers and the database, and is not lost for the run."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from taskyard import dispatch, worker
from taskyard.db.engine import Connection, Database
from taskyard.drive.session import CUT_OFF
from taskyard.errors import SetupError
from taskyard.jobs import engine
from taskyard.runs import store as runs
from taskyard.serve import Stop, _serve
from taskyard.settings import Settings
from tests.support.outage import outage
from tests.support.processes import agents_of
from tests.support.yard import Run, Yard, eventually, of_method, said

SCRIPTED = {"agent": "scripted"}
LOST = psycopg.OperationalError("the connection was lost")


async def test_a_run_and_its_worker_survive_an_outage(live: Yard, database: Database) -> None:
    # Long enough after it for a worker that gave up to have aborted the run.
    run = await live.api().start("SAY before\nSLEEP 16\nSAY after", **SCRIPTED)
    await run.shown("before")
    await outage(database, 4)
    # The first request may meet a connection that is gone; the others do not.
    answers = [(await live.api().get("tasks/")).status_code for _ in range(10)]
    assert answers.count(503) <= 1
    later = await live.api().start("SAY later", **SCRIPTED)
    assert said(await (await run_to_end(later)).log()) == "later"
    await run_to_end(run)
    log = await run.log()
    assert said(log).split() == ["before", "after"]
    assert len(of_method(log, "_posthog/turn_complete")) == 1


async def run_to_end(run: Run) -> Run:
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
    return run


async def test_a_lease_survives_a_failed_renewal(
    live: Yard, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew, renewals = runs.renew, 0

    async def once_failing(*arguments: Any) -> bool:
        nonlocal renewals
        renewals += 1
        if renewals == 1:
            raise LOST
        return await renew(*arguments)

    monkeypatch.setattr(runs, "renew", once_failing)
    monkeypatch.setattr(runs, "LEASE_S", 1.5)
    run = await live.api().start("SLEEP 4", **SCRIPTED)
    await run.stream()
    assert (await run.fetch())["status"] == "completed"
    assert renewals > 2
    assert await database.fetch("SELECT 1 FROM run_cursors WHERE leased_until IS NOT NULL") == []


class Cut(Database):
    """The way of one worker to the database, which a test can cut."""

    away = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        if self.away:
            raise LOST
        async with super().connection() as connection:
            yield connection


@pytest.mark.parametrize("taken", [False, True])
async def test_a_worker_that_is_cut_off_stops_its_agent(
    yard: Yard, settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """It cannot know whether another one has the run by now; the run goes on when it has not."""
    monkeypatch.setattr(runs, "LEASE_S", 3)
    mine = Cut(database.url)
    await mine.open()
    async with worker.running_worker(settings, mine):
        run = await yard.api().start("SAY before\nSLEEP 60", mode="interactive", **SCRIPTED)
        await run.shown("before")
        mine.away = True

        async def agents() -> list[int]:
            return agents_of(run.id)

        await eventually(agents, lambda pids: not pids, lambda pids: f"end of the agent {pids}")
        if taken:
            other = await eventually(
                lambda: runs.claim(database, UUID(run.id), "other", "elsewhere"), bool, lambda _: "free lease"
            )
            assert other is not None
            mine.away = False

            async def folders() -> list[Path]:
                return list((settings.data_dir / "sandboxes").iterdir())

            await eventually(folders, lambda left: not left, lambda left: f"end of the sandbox {left}")
            assert agents_of(run.id) == []
            assert len(of_method(await run.log(), "_posthog/run_started")) == 1
            assert await runs.renew(database, other.lease)
        else:
            mine.away = False
            await eventually(
                run.log,
                lambda log: [one["loaded"] for one in of_method(log, "_posthog/session/resume")] == [True],
                lambda log: f"a second start in {log[-3:]}",
            )
            # It is not the run's fault, however often it happens.
            assert await database.fetch("SELECT resumes FROM run_cursors") == [{"resumes": 0}]
            await run.command("cancel")
            log = await run.turns(1)
            assert said(log) == "before"
            lines = [params["message"] for params in of_method(log, "_posthog/console")]
            assert any(line.startswith(CUT_OFF) for line in lines), lines
            await run.cancel()
            await run.stream()
    await mine.close()


async def test_a_driver_that_failed_before_its_run_began(live: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, claims = runs.claim, 0

    async def once_failing(*arguments: Any, **options: Any) -> Any:
        nonlocal claims
        claims += 1
        if claims == 1:
            raise LOST
        return await claim(*arguments, **options)

    monkeypatch.setattr(runs, "claim", once_failing)
    await run_to_end(await live.api().start("SAY x", **SCRIPTED))


class TestAbandoned:
    """Runs that a worker left in every state that it can leave them in; another one starts afterwards."""

    @pytest.fixture(autouse=True)
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "SWEEP_S", 0.5)

    @pytest.mark.parametrize("left", ["nothing", "taken", "claimed"])
    async def test_before_it_began_it_is_driven(
        self, yard: Yard, settings: Settings, database: Database, left: str
    ) -> None:
        run = await yard.api().start("SAY x", **SCRIPTED)
        await leave(database, run, left)
        async with worker.running_worker(settings, database):
            await run_to_end(run)

    @pytest.mark.parametrize("left", ["nothing", "claimed"])
    async def test_in_the_middle_it_goes_on(
        self, yard: Yard, settings: Settings, database: Database, left: str
    ) -> None:
        run = await yard.api().start("SAY x", **SCRIPTED)
        await leave(database, run, left)
        await database.execute("UPDATE runs SET status = 'in_progress'")
        async with worker.running_worker(settings, database):
            await run_to_end(run)
            await run.stream()

    async def test_who_waits_for_a_run_that_has_ended_gets_an_answer(
        self, yard: Yard, settings: Settings, database: Database
    ) -> None:
        run = await yard.api().start("SAY x", **SCRIPTED)
        await run.command("user_message", content="hello")
        await leave(database, run, "claimed")
        await run.cancel()
        async with worker.running_worker(settings, database):
            await eventually(
                lambda: database.fetch("SELECT error FROM commands WHERE answered_at IS NOT NULL"),
                lambda answers: answers == [{"error": "the run has ended"}],
                lambda answers: f"answer, but {answers}",
            )
        assert (await run.fetch())["status"] == "cancelled"
        assert await database.fetch("SELECT 1 FROM run_queue") == []

    async def test_a_job_of_a_version_without_the_queue(
        self, yard: Yard, settings: Settings, database: Database
    ) -> None:
        run = await yard.api().start("SAY x", **SCRIPTED)
        await leave(database, run, "nothing")
        async with engine(database.url).open_async() as app:
            task = app.configure_task("drive", queue="runs", lock=f"run:{run.id}", allow_unknown=True)
            await task.defer_async(run_id=run.id)
        async with worker.running_worker(settings, database):
            await run_to_end(run)
            await eventually(
                lambda: database.fetch("SELECT status FROM procrastinate_jobs"),
                lambda jobs: jobs == [],
                lambda jobs: f"end of {jobs}",
            )


async def leave(database: Database, run: Run, left: str) -> None:
    """What is left of a run that a dead worker took: neither a place in the queue nor a holder, its hold, its lease."""
    await database.execute("DELETE FROM run_queue")
    held = {"nothing": "", "taken": "reserved_by", "claimed": "worker"}[left]
    if held:
        await database.execute(
            "UPDATE run_cursors SET reserved_by = CASE WHEN %(held)s = 'reserved_by' THEN 'dead' END,"
            " worker = CASE WHEN %(held)s = 'worker' THEN 'dead' END,"
            " generation = generation + (%(held)s = 'worker')::int,"
            " leased_until = clock_timestamp() + interval '1 s' WHERE run_id = %(run)s",
            held=held,
            run=run.id,
        )


async def test_the_job_engine_is_started_again(live: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker ends by itself, and nothing else does."""
    from procrastinate.manager import JobManager

    fetch, fetches = JobManager.fetch_job, 0

    async def once_failing(self: JobManager, *arguments: Any, **options: Any) -> Any:
        nonlocal fetches
        fetches += 1
        if fetches == 1:
            from procrastinate.exceptions import ConnectorException

            raise ConnectorException
        return await fetch(self, *arguments, **options)

    monkeypatch.setattr(JobManager, "fetch_job", once_failing)
    await run_to_end(await live.api().start("SAY x", **SCRIPTED))

    async def fetched() -> int:
        return fetches

    await eventually(fetched, lambda count: count > 1, lambda count: f"more than {count} looks for jobs")


async def test_a_server_without_an_address_begins_no_run(yard: Yard, settings: Settings) -> None:
    run = await yard.api().start("SLEEP 60", **SCRIPTED)
    begun = time.monotonic()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SetupError, match="cannot listen"):
            await _serve(settings, "127.0.0.1", taken.getsockname()[1], Stop())
    assert time.monotonic() - begun < 5
    assert (await run.fetch())["status"] == "queued"
