"""Runs that outlive their agent, their worker, and long silences."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from taskyard import dispatch
from taskyard.db.engine import Database
from taskyard.drive.checkpoint import Keeper
from taskyard.drive.session import AgentSession
from taskyard.drive.setup import PreparingRun
from taskyard.runs import store as runs
from taskyard.settings import AgentSettings, RunSettings, Settings, WorkerSettings
from taskyard.worker import running_worker
from tests.conftest import make_settings
from tests.support.processes import agents_of, kill_agent
from tests.support.repositories import run_git
from tests.support.yard import DEADLINE_S, Run, Yard, eventually, of_method, ok, said

SCRIPTED = {"agent": "scripted"}
ASKING = {
    "mode": "interactive",
    "runtime_adapter": "claude",
    "model": "claude-sonnet-4-6",
    "initial_permission_mode": "default",
    **SCRIPTED,
}


def sandboxes(settings: Settings) -> list[Path]:
    return list((settings.data_dir / "sandboxes").iterdir())


async def completed(run: Run) -> dict[str, Any]:
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
    return body


async def suspended(run: Run) -> dict[str, Any]:
    body = await eventually(
        run.fetch, lambda body: body["state"].get("suspended") is True, lambda body: f"sleep of {body}"
    )
    assert body["status"] == "in_progress"
    return body


async def let_go_of(database: Database) -> None:
    """Wait until no worker holds a run."""
    await eventually(
        lambda: database.fetch("SELECT 1 FROM run_cursors WHERE leased_until IS NOT NULL"),
        lambda rows: not rows,
        lambda _: "end of a lease",
    )


def numbers(stream: list[tuple[str, Any]]) -> list[int]:
    return [int(event_id.rpartition("-")[2]) for event_id, _ in stream]


class TestLostAgent:
    async def test_a_killed_agent_goes_on_with_its_turn(
        self, live: Yard, shop: Path, repository: str
    ) -> None:
        text = "SAY one\nWRITE a.txt one\nCOMMIT first\nWRITE b.txt two\nSLEEP 3\nSAY two"
        run = await live.api().start(text, repository=repository, **SCRIPTED)
        await run.shown("Write b.txt")
        await kill_agent(run)
        body = await completed(run)
        log = await run.log()
        assert said(log).split() == ["one", "two"]
        [resumed] = of_method(log, "_posthog/session/resume")
        assert resumed["loaded"] is True
        assert len(of_method(log, "_posthog/turn_complete")) == 1
        branch = body["output"]["head_branch"]
        assert run_git(shop, "show", f"{branch}:b.txt") == "two"
        assert run_git(shop, "log", "--format=%s", "main.." + branch).splitlines()[-1] == "first"
        assert any(
            "goes on with a new process" in line["message"] for line in of_method(log, "_posthog/console")
        )

    async def test_an_agent_that_is_lost_again_and_again(self, live: Yard) -> None:
        run = await live.api().start("SHELL kill -9 -1", **SCRIPTED)
        body = await run.status("failed")
        assert body["state"]["error_type"] == "agent_lost"
        assert "4 times in a row without progress; the limit is 3" in body["error_message"]

    async def test_between_turns(self, live: Yard) -> None:
        run = await live.api().start("WRITE kept.txt x\nSAY one", mode="interactive", **SCRIPTED)
        await run.turns(1)
        await kill_agent(run)
        await run.command("user_message", content="SHELL cat kept.txt\nSAY two")
        log = await run.turns(2)
        assert said(log).split() == ["one", "two"]
        assert 'exitCode": 0' in await run.stream_text()
        await run.cancel()


class TestAnotherWorker:
    """A worker leaves its run; the next one is another process as far as the database can tell."""

    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        worker, often = WorkerSettings(drain_s=0.2), RunSettings(checkpoint_s=0.3)
        return make_settings(tmp_path / "data", database_url, worker=worker, runs=often)

    @pytest.fixture
    def elsewhere(self, tmp_path: Path, database_url: str, settings: Settings) -> Settings:
        """Another machine; both have the objects of one storage."""
        other = make_settings(tmp_path / "other", database_url, worker=settings.worker)
        settings.data_dir.mkdir(exist_ok=True)
        (settings.data_dir / "objects").mkdir()
        other.data_dir.mkdir()
        (other.data_dir / "objects").symlink_to(settings.data_dir / "objects")
        return other

    @pytest.mark.parametrize("where", ["here", "elsewhere"])
    async def test_a_stopped_worker_hands_its_run_over(
        self, yard: Yard, settings: Settings, elsewhere: Settings, shop: Path, database: Database, where: str
    ) -> None:
        name = ok(await yard.api().post("repositories/", {"origin": str(shop)}), 201)["name"]
        text = "WRITE a.txt one\nCOMMIT first\nWRITE b.txt two\nSHELL echo x > ignored.log\nSLEEP 2\nSAY done"
        async with running_worker(settings, database):
            run = await yard.api().start(text, repository=name, **SCRIPTED)
            await run.shown("ignored.log")
        assert (await run.fetch())["status"] == "in_progress"
        assert agents_of(run.id) == []
        async with running_worker(settings if where == "here" else elsewhere, database):
            body = await completed(run)
        branch = body["output"]["head_branch"]
        assert run_git(shop, "show", f"{branch}:b.txt") == "two"
        log = await run.log()
        assert said(log) == "done"
        assert [one["loaded"] for one in of_method(log, "_posthog/session/resume")] == [True]
        assert numbers(await run.stream()) == sorted(set(numbers(await run.stream())))
        for folder in (settings, elsewhere):
            if (folder.data_dir / "sandboxes").exists() and (folder is settings) == (where == "here"):
                assert sandboxes(folder) == []

    async def test_a_sandbox_that_was_not_filled_whole_is_not_used(
        self,
        yard: Yard,
        settings: Settings,
        elsewhere: Settings,
        shop: Path,
        database: Database,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Its worker was stopped between the clone and the files that were not committed."""
        name = ok(await yard.api().post("repositories/", {"origin": str(shop)}), 201)["name"]
        text = "WRITE a.txt one\nSHELL true\nSLEEP 2\nSHELL cat a.txt\nSAY done"
        async with running_worker(elsewhere, database):
            run = await yard.api().start(text, repository=name, **SCRIPTED)
            await run.shown("true")
        filling = asyncio.Event()

        async def no_end(*_: Any) -> None:
            filling.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(Keeper, "bring_workspace", no_end)
            async with running_worker(settings, database):
                await asyncio.wait_for(filling.wait(), DEADLINE_S)
        assert len(sandboxes(settings)) == 1
        async with running_worker(settings, database):
            await completed(run)
        assert '"output": "one"' in await run.stream_text()

    async def test_a_cancel_between_two_workers_ends_the_turn(
        self, yard: Yard, settings: Settings, database: Database
    ) -> None:
        async with running_worker(settings, database):
            run = await yard.api().start("SAY one\nSLEEP 60\nSAY two", mode="interactive", **SCRIPTED)
            await run.shown("one")
        cancel = asyncio.create_task(run.command("cancel"))
        await eventually(lambda: database.fetch("SELECT 1 FROM commands"), bool, lambda _: "command")
        async with running_worker(settings, database):
            assert (await cancel)["result"] == {"cancelled": True}
            log = await run.turns(1)
            assert said(log) == "one"
            assert [turn["stopReason"] for turn in of_method(log, "_posthog/turn_complete")] == ["cancelled"]
            # It was for that turn alone.
            await run.command("user_message", content="SAY three")
            assert said(await run.turns(2)).split() == ["one", "three"]
            await run.cancel()
            await let_go_of(database)

    async def test_an_idle_run_sleeps_through_a_restart(
        self, yard: Yard, settings: Settings, elsewhere: Settings, database: Database
    ) -> None:
        async with running_worker(settings, database):
            run = await yard.api().start("WRITE a.txt one\nSAY x", mode="interactive", **SCRIPTED)
            await run.turns(1)
        assert (await run.fetch())["state"]["suspended"] is True
        assert sandboxes(settings) == []
        async with running_worker(elsewhere, database):
            await run.command("user_message", content="SHELL cat a.txt\nSAY y")
            log = await run.turns(2)
            assert said(log).split() == ["x", "y"]
            assert '"output": "one"' in await run.stream_text()
            assert "suspended" not in (await run.fetch())["state"]
            await run.cancel()
            await let_go_of(database)

    @pytest.mark.parametrize("with_repository", [False, True])
    async def test_a_worker_stopped_while_it_sets_a_resumed_run_up(
        self,
        yard: Yard,
        settings: Settings,
        database: Database,
        shop: Path,
        monkeypatch: pytest.MonkeyPatch,
        with_repository: bool,
    ) -> None:
        api, name = yard.api(), None
        if with_repository:
            name = ok(await api.post("repositories/", {"origin": str(shop)}), 201)["name"]
        make, reached = PreparingRun._make_agent, asyncio.Event()

        async def hanging_once(*arguments: Any) -> None:
            if not reached.is_set():
                reached.set()
                await asyncio.Event().wait()
            await make(*arguments)

        async with running_worker(settings, database):
            first = await api.start("WRITE a.txt one\nSAY one", repository=name, **SCRIPTED)
            await completed(first)
            await let_go_of(database)
            monkeypatch.setattr(PreparingRun, "_make_agent", hanging_once)
            body = {"resume_from_run_id": first.id, "pending_user_message": "SHELL cat a.txt\nSAY two"}
            task = ok(await api.post(f"tasks/{first.task_id}/run/", {**body, **SCRIPTED}))
            second = Run(api, first.task_id, task["latest_run"]["id"])
            async with asyncio.timeout(DEADLINE_S):
                await reached.wait()
        assert (await second.fetch())["status"] == "in_progress"
        async with running_worker(settings, database):
            await completed(second)
        assert '"output": "one"' in await second.stream_text()
        assert [one["loaded"] for one in of_method(await second.log(), "_posthog/session/resume")] == [True]

    async def test_a_lost_worker(
        self,
        yard: Yard,
        settings: Settings,
        elsewhere: Settings,
        database: Database,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Its lease ran out while it was stopped; its folder is still in use, so a checkpoint is all there is."""
        monkeypatch.setattr(dispatch, "SWEEP_S", 0.3)
        async with running_worker(settings, database):
            run = await yard.api().start("WRITE a.txt one\nSLEEP 2\nSHELL cat a.txt\nSAY done", **SCRIPTED)
            await run.shown("Write a.txt")
            await eventually(
                lambda: database.fetch("SELECT 1 FROM checkpoints WHERE parts ? 'session'"),
                bool,
                lambda _: "checkpoint",
            )
            monkeypatch.setattr(runs, "LEASE_S", 1)
            row = await database.fetch_one(
                "UPDATE run_cursors SET generation = generation + 1, leased_until = clock_timestamp() RETURNING resumes"
            )
            assert row == {"resumes": 0}
            await completed(run)
        log = await run.log()
        assert said(log) == "done"
        assert '"output": "one"' in await run.stream_text()


class TestSleep:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(suspend_after_s=0.3)

    async def test_sleep_and_wake(
        self, live: Yard, settings: Settings, database: Database, shop: Path, repository: str
    ) -> None:
        run = await live.api().start(
            "WRITE a.txt one\nSAY one", repository=repository, mode="interactive", **SCRIPTED
        )
        stream = asyncio.create_task(run.stream())
        await suspended(run)
        await let_go_of(database)
        assert sandboxes(settings) == []
        assert agents_of(run.id) == []
        assert await database.fetch("SELECT 1 FROM run_queue") == []
        assert not stream.done()
        await run.command("user_message", content="SHELL cat a.txt\nWRITE b.txt two\nSAY two")
        await run.turns(2)
        body = await suspended(run)
        assert run_git(shop, "show", f"{body['output']['head_branch']}:b.txt") == "two"
        assert await run.patch(status="completed")
        events = await stream
        assert numbers(events) == list(range(1, len(events) + 1))[: len(events)] or numbers(events) == sorted(
            set(numbers(events))
        )
        final = await run.fetch()
        assert "suspended" not in final["state"]
        assert said(await run.log()).split() == ["one", "two"]

    async def test_a_permission_is_asked_for_over_a_sleep(self, live: Yard, settings: Settings) -> None:
        run = await live.api().start("SAY before\nASK May I\nSAY after", **ASKING)
        await suspended(run)
        [asked] = of_method(await run.log(), "_posthog/permission_request")
        answer = await run.command("permission_response", requestId=asked["requestId"], optionId="allow")
        assert answer["result"] == {"resolved": True}
        log = await run.turns(1)
        assert said(log).splitlines() == ["before", "May I: allow", "after"]
        assert len(of_method(log, "_posthog/permission_request")) == 1
        again = await run.command("permission_response", requestId=asked["requestId"], optionId="allow")
        assert "no such permission request is open" in again["error"]["message"]
        await run.cancel()

    async def test_a_message_does_not_wake_who_waits_for_a_permission(
        self, live: Yard, database: Database
    ) -> None:
        run = await live.api().start("SAY before\nASK May I\nSAY after", **ASKING)
        await suspended(run)
        await let_go_of(database)
        await run.command("user_message", content="SAY later")
        assert await database.fetch("SELECT 1 FROM run_queue") == []
        [asked] = of_method(await run.log(), "_posthog/permission_request")
        # What wakes it finds the message there, and it sleeps again all the same.
        await run.command("set_config_option", configId="mode", value="default")
        await suspended(run)
        await let_go_of(database)
        assert await database.fetch("SELECT 1 FROM run_queue") == []
        assert len(of_method(await run.log(), "_posthog/run_started")) == 2
        await run.command("permission_response", requestId=asked["requestId"], optionId="allow")
        log = await run.turns(2)
        assert said(log).splitlines() == ["before", "May I: allow", "after", "later"]
        await run.cancel()

    @pytest.mark.parametrize("steered", [False, True])
    async def test_a_cancel_wakes_who_waits_for_a_permission(self, live: Yard, steered: bool) -> None:
        run = await live.api().start("SAY before\nASK May I\nSAY after", **ASKING)
        await suspended(run)
        if steered:
            await run.command("steer", content="SAY something else")
        else:
            assert (await run.command("cancel"))["result"] == {"cancelled": True}
        log = await run.turns(2 if steered else 1)
        stops = [turn["stopReason"] for turn in of_method(log, "_posthog/turn_complete")]
        assert stops == ["cancelled", *(["end_turn"] if steered else [])]
        assert said(log).splitlines() == ["before", *(["something else"] if steered else [])]
        assert len(of_method(log, "_posthog/permission_request")) == 1
        await run.cancel()

    @pytest.mark.parametrize("end", ["cancel", "deadline"])
    async def test_a_sleeper_with_messages_ends(
        self, live: Yard, database: Database, monkeypatch: pytest.MonkeyPatch, end: str
    ) -> None:
        monkeypatch.setattr(dispatch, "SWEEP_S", 0.3)
        run = await live.api().start("ASK May I", **ASKING)
        await suspended(run)
        await run.command("user_message", content="SAY later")
        if end == "cancel":
            await run.cancel()
        else:
            await database.execute("UPDATE run_cursors SET due_at = clock_timestamp()")
            assert (await run.status("failed"))["state"]["error_type"] == "deadline"
        await run.logged("A message was not delivered to the agent: the run had ended.")

    async def test_an_output_that_comes_while_it_falls_asleep_completes_it(
        self, live: Yard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        close, closing, go_on = AgentSession.close, asyncio.Event(), asyncio.Event()

        async def slow_close(self: AgentSession, **options: Any) -> None:
            closing.set()
            await go_on.wait()
            await close(self, **options)

        monkeypatch.setattr(AgentSession, "close", slow_close)
        run = await self.with_schema(live)
        async with asyncio.timeout(DEADLINE_S):
            await closing.wait()
        body = ok(await run.api.patch(run.path("set_output/"), {"output": {"answer": 42}}))
        assert body["status"] == "in_progress"
        go_on.set()
        body = await run.status("completed")
        assert body["output"] == {"answer": 42}
        await run.stream()

    async def test_an_output_completes_a_sleeper_whose_worker_still_cleans_up(
        self, live: Yard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release, go_on = runs.release, asyncio.Event()

        async def slow_release(*arguments: Any) -> None:
            await go_on.wait()
            await release(*arguments)

        monkeypatch.setattr(runs, "release", slow_release)
        run = await self.with_schema(live)
        await suspended(run)
        ok(await run.api.patch(run.path("set_output/"), {"output": {"answer": 42}}))
        assert (await run.fetch())["status"] == "completed"
        go_on.set()
        await run.stream()

    async def with_schema(self, live: Yard) -> Run:
        """A run that falls asleep, and that an output completes."""
        api = live.api()
        task = await api.create_task(description="SAY hi", json_schema={"type": "object"})
        started = ok(await api.post(f"tasks/{task['id']}/run/", {"mode": "interactive", **SCRIPTED}))
        return Run(api, task["id"], started["latest_run"]["id"])

    async def test_cancel_while_it_sleeps(self, live: Yard, database: Database) -> None:
        run = await live.api().start("SAY one", mode="interactive", **SCRIPTED)
        await suspended(run)
        await run.cancel()
        await run.stream()
        assert (await run.fetch())["status"] == "cancelled"

    async def test_a_steering_message_comes_first(self, live: Yard) -> None:
        run = await live.api().start("SAY one\nSLEEP 60", mode="interactive", **SCRIPTED)
        await run.shown("one")
        await run.command("user_message", content="SAY three")
        assert (await run.command("steer", content="SAY two"))["result"] == {"queued": True}
        log = await run.turns(3)
        assert said(log).split() == ["one", "two", "three"]
        stops = [turn["stopReason"] for turn in of_method(log, "_posthog/turn_complete")]
        assert stops == ["cancelled", "end_turn", "end_turn"]
        await run.cancel()


class TestInactivity:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(suspend_after_s=0.2, inactivity_s=2)

    async def test_a_sleeping_run_completes(self, live: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "SWEEP_S", 0.3)
        run = await live.api().start("SAY one", mode="interactive", **SCRIPTED)
        await suspended(run)
        body = await run.status("completed")
        assert body["error_message"] == "Run timed out due to inactivity"
        assert body["state"]["timed_out_inactivity"] is True
        await run.stream()


class TestContinuation:
    """A new run that resumes another one."""

    async def test_it_finds_the_workspace_and_the_session(
        self, live: Yard, shop: Path, repository: str
    ) -> None:
        first = await live.api().start("WRITE a.txt one\nSAY one", repository=repository, **SCRIPTED)
        await completed(first)
        run_git(shop, "branch", "-D", (await first.fetch())["output"]["head_branch"])
        second = await self.resumed(live, first, "SHELL cat a.txt\nSAY two", **SCRIPTED)
        await completed(second)
        assert '"output": "one"' in await second.stream_text()
        [resumed] = of_method(await second.log(), "_posthog/session/resume")
        assert resumed["loaded"] is True

    async def test_another_agent_is_told_what_was_said(self, live: Yard) -> None:
        first = await live.api().start("WRITE a.txt one\nSAY remember the sea", **SCRIPTED)
        await completed(first)
        second = await self.resumed(live, first, "SHELL cat a.txt\nSAY two", agent="other")
        await completed(second)
        assert '"output": "one"' in await second.stream_text()
        before, told = of_method(await second.log(), "session/prompt")[-1]["prompt"]
        assert "    You: remember the sea" in before["text"]
        assert told["text"] == "SHELL cat a.txt\nSAY two"

    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        from taskyard.agents.adapters import adapters

        plain = make_settings(tmp_path / "data", database_url)
        command = list(adapters(plain)["scripted"].command)
        return make_settings(
            tmp_path / "data", database_url, agents={"other": AgentSettings(command=command)}
        )

    async def resumed(self, live: Yard, first: Run, message: str, **fields: Any) -> Run:
        body = {"resume_from_run_id": first.id, "pending_user_message": message, **fields}
        task = ok(await live.api().post(f"tasks/{first.task_id}/run/", body))
        return Run(live.api(), first.task_id, task["latest_run"]["id"])
