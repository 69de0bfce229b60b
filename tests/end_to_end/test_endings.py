"""However a run ends, and whatever comes at that moment: it has a status, a reason, and nothing is left of it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from taskyard import dispatch
from taskyard.agents.adapters import adapters
from taskyard.db.engine import Database
from taskyard.drive import driver, watch
from taskyard.drive.failures import RunFailure
from taskyard.drive.session import AgentSession
from taskyard.drive.setup import PreparingRun
from taskyard.drive.work import Work
from taskyard.runs import lifecycle
from taskyard.sandbox.bubblewrap import BubblewrapProvider, BubblewrapSandbox
from taskyard.sandbox.process import BubblewrapProcess
from taskyard.sandbox.provider import SandboxError
from taskyard.settings import AgentSettings, ModelSettings, RunSettings, Settings, Upstream, WorkerSettings
from tests.conftest import make_settings
from tests.support.acp_agents import PRELUDE
from tests.support.processes import agents_of, kill_agent
from tests.support.repositories import run_git
from tests.support.yard import Yard, of_method, open_yard, said

SCRIPTED = {"agent": "scripted"}


def sandboxes(settings: Settings) -> list[Path]:
    return list((settings.data_dir / "sandboxes").iterdir())


class TestUnstorableText:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        command = ["sh", "-c", r"printf 'bad\000byte' >&2; exit 3"]
        return make_settings(tmp_path / "data", database_url, agents={"odd": AgentSettings(command=command)})

    async def test_a_null_in_what_the_agent_says(self, live: Yard) -> None:
        run = await live.api().start("SAY x", agent="odd")
        body = await run.status("failed")
        assert "bad\ufffdbyte" in body["error_message"]


LAST_WORD = """
while True:
    request = read()
    method = request.get("method")
    if method == "initialize":
        answer(request, protocolVersion=1, agentCapabilities={"sessionCapabilities": {"close": {}}})
    elif method == "session/new":
        answer(request, sessionId="s")
    elif method == "session/prompt":
        update("first")
        answer(request, stopReason="end_turn")
    elif method == "session/close":
        update("last")
        sys.exit()
"""


class TestLastWord:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        plain = make_settings(tmp_path / "data", database_url)
        command = [adapters(plain)["scripted"].command[0], "-c", PRELUDE + LAST_WORD]
        return make_settings(tmp_path / "data", database_url, agents={"last": AgentSettings(command=command)})

    async def test_what_an_agent_says_while_its_session_is_closed_is_in_the_log(self, live: Yard) -> None:
        run = await live.api().start("go", agent="last")
        await run.stream()
        assert (await run.fetch())["error_message"] is None
        assert said(await run.log()).split() == ["first", "last"]


class TestKeyFile:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        upstream = Upstream(base_url="https://models.example", api_key_file=tmp_path / "no-such-file")
        models = ModelSettings(anthropic=upstream)
        return make_settings(tmp_path / "data", database_url, models=models)

    async def test_a_key_that_cannot_be_read(self, live: Yard) -> None:
        run = await live.api().start("SAY x", **SCRIPTED)
        body = await run.status("failed", "completed")
        assert body["state"]["error_type"] == "agent_start_failed"
        text = (
            "The file of the setting models.anthropic.api_key_file cannot be read: No such file or directory."
        )
        assert body["error_message"] == text


async def test_what_fails_while_failing_does_not_hide_why(
    live: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def publish(_: Work) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Work, "publish", publish)
    run = await live.api().start("CRASH 3", **SCRIPTED)
    body = await run.status("failed")
    assert body["state"]["error_type"] == "agent_crashed"


async def test_what_a_lost_agent_did_is_published_when_the_next_one_does_not_start(
    live: Yard, shop: Path, repository: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, starts = PreparingRun._make_agent, 0

    async def failing_again(*arguments: Any) -> None:
        nonlocal starts
        starts += 1
        if starts > 1:
            raise RunFailure("agent_start_failed", "it does not start")
        await make(*arguments)

    monkeypatch.setattr(PreparingRun, "_make_agent", failing_again)
    text = "WRITE a.txt one\nCOMMIT first\nWRITE b.txt two\nSLEEP 60"
    run = await live.api().start(text, repository=repository, **SCRIPTED)
    await run.shown("Write b.txt")
    await kill_agent(run)
    body = await run.status("failed", "completed")
    assert (body["state"]["error_type"], body["error_message"]) == ("agent_start_failed", "it does not start")
    assert run_git(shop, "show", f"{body['branch']}:b.txt") == "two"
    assert await database.fetch("SELECT 1 FROM checkpoints WHERE parts ? 'workspace' AND parts ? 'session'")


async def test_an_agent_that_cannot_be_closed_leaves_no_sandbox(
    live: Yard, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = AgentSession.close

    async def failing_close(self: AgentSession) -> None:
        await close(self)
        raise RuntimeError

    monkeypatch.setattr(AgentSession, "close", failing_close)
    run = await live.api().start("CRASH 3", **SCRIPTED)
    await run.status("failed")
    await run.stream()
    assert sandboxes(settings) == []


async def test_an_agent_that_does_not_start_leaves_no_gateway(
    live: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, bound = BubblewrapSandbox.exec, 0

    async def failing_exec(self: BubblewrapSandbox, *arguments: Any, **options: Any) -> BubblewrapProcess:
        nonlocal bound
        if "on_listener" not in options:
            return await execute(self, *arguments, **options)
        listener = socket.create_server(("127.0.0.1", 0))
        bound = listener.getsockname()[1]
        await options["on_listener"](listener)
        raise SandboxError("it broke")

    monkeypatch.setattr(BubblewrapSandbox, "exec", failing_exec)
    run = await live.api().start("SAY x", **SCRIPTED)
    body = await run.status("failed")
    assert (body["state"]["error_type"], body["error_message"]) == ("agent_start_failed", "it broke")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", bound)


async def test_an_end_while_the_sandbox_is_made_leaves_none(
    live: Yard, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, look = BubblewrapProvider.create, driver.Driver._look
    asked, made = asyncio.Event(), asyncio.Event()

    async def slow_create(*arguments: Any) -> BubblewrapSandbox:
        await asked.wait()
        sandbox = await create(*arguments)
        made.set()
        return sandbox

    async def slow_look(self: driver.Driver) -> None:
        asked.set()
        await made.wait()
        await look(self)

    monkeypatch.setattr(BubblewrapProvider, "create", slow_create)
    monkeypatch.setattr(driver.Driver, "_look", slow_look)
    run = await live.api().start("SAY x", **SCRIPTED)
    await run.logged("Setting up sandbox")
    await run.cancel()
    await run.stream()
    assert made.is_set()
    assert sandboxes(settings) == []


async def test_a_message_at_the_very_end_is_delivered_or_refused(
    live: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, late = lifecycle.change, asyncio.Event()

    async def slow_change(*arguments: Any, **changes: Any) -> Any:
        if changes.get("status") == "completed":
            late.set()
            await asyncio.sleep(1)  # the message comes in before the run is over, if anything lets it
        return await change(*arguments, **changes)

    monkeypatch.setattr(lifecycle, "change", slow_change)
    run = await live.api().start("SLEEP 0.1", **SCRIPTED)
    await late.wait()
    body = {"jsonrpc": "2.0", "id": 1, "method": "user_message", "params": {"content": "SAY late"}}
    answer = await live.api().post(run.path("command/"), body)
    await run.stream()
    if answer.status_code == 200:
        assert said(await run.log()) == "late"
    else:
        assert answer.json() == {"error": "No active sandbox for this task run"}


async def test_what_stays_in_the_mailbox_is_told(live: Yard) -> None:
    run = await live.api().start("SAY x\nSLEEP 60", mode="interactive", **SCRIPTED)
    await run.logged("session/prompt")
    await run.command("user_message", content="SAY never")
    await run.cancel()
    await run.stream()
    log = await run.log()
    assert [line["message"] for line in of_method(log, "_posthog/console") if line["level"] == "warn"] == [
        "A message was not delivered to the agent: the run had ended."
    ]


class TestHangingAgent:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(agent_silence_s=3.0)

    async def test_a_command_that_is_not_answered(self, live: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "OBEY_S", 1.0)
        run = await live.api().start("SAY before\nHANG", **SCRIPTED)
        await run.shown("before")
        answer = await run.command("set_config_option", configId="mode", value="plan")
        assert answer["error"]["message"] == "the agent did not answer within 1 seconds"
        assert (await run.status("failed"))["state"]["error_type"] == "agent_silent"


class TestDeadline:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(wall_clock_s=6.0)

    async def test_the_work_of_a_run_that_took_too_long_is_published(
        self, live: Yard, shop: Path, repository: str
    ) -> None:
        run = await live.api().start("WRITE half.txt done\nSLEEP 60", repository=repository, **SCRIPTED)
        body = await run.status("failed")
        assert body["state"]["error_type"] == "deadline"
        assert run_git(shop, "show", f"{body['output']['head_branch']}:half.txt") == "done"


class TestStop:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        return make_settings(tmp_path / "data", database_url, worker=WorkerSettings(drain_s=0.1))

    async def test_in_a_turn(self, settings: Settings, database: Database) -> None:
        async with open_yard(settings, database, worker=True) as yard:
            run = await yard.api().start("SAY x\nSLEEP 60", **SCRIPTED)
            await run.logged("session/prompt")
        # The next worker here goes on with it.
        assert await database.fetch_one("SELECT status FROM runs") == {"status": "in_progress"}
        assert [folder.name for folder in sandboxes(settings)] == [run.id]
        assert agents_of(run.id) == []
        assert await database.fetch("SELECT 1 FROM run_cursors WHERE leased_until IS NOT NULL") == []
        assert len(await database.fetch("SELECT 1 FROM run_queue")) == 1

    async def test_while_a_run_fails(
        self, settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publishing = asyncio.Event()

        async def publish(_: Work) -> None:
            publishing.set()
            await asyncio.sleep(60)

        monkeypatch.setattr(Work, "publish", publish)
        monkeypatch.setattr(dispatch, "DRIVERS_S", 2)
        async with open_yard(settings, database, worker=True) as yard:
            await yard.api().start("CRASH 3", **SCRIPTED)
            await publishing.wait()
        row = await database.fetch_one("SELECT status, state FROM runs")
        assert row is not None
        assert (row["status"], row["state"]["error_type"]) == ("failed", "agent_crashed")
        await nothing_left(settings, database)

    async def test_while_a_run_is_cleaned_up(
        self, settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        destroy, destroying = BubblewrapSandbox.destroy, asyncio.Event()

        async def slow_destroy(self: BubblewrapSandbox) -> None:
            destroying.set()
            await asyncio.sleep(1)
            await destroy(self)

        async with open_yard(settings, database, worker=True) as yard:
            monkeypatch.setattr(BubblewrapSandbox, "destroy", slow_destroy)  # after the self-test
            run = await yard.api().start("SAY x", **SCRIPTED)
            await run.status("completed")
            await destroying.wait()
        await nothing_left(settings, database)

    async def test_before_a_run_began_it_stays_in_the_queue(
        self, settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load, loading = driver.Driver._load, asyncio.Event()

        async def slow_load(self: driver.Driver) -> None:
            await load(self)
            loading.set()
            await asyncio.sleep(60)

        monkeypatch.setattr(driver.Driver, "_load", slow_load)
        monkeypatch.setattr(dispatch, "DRIVERS_S", 2)
        async with open_yard(settings, database, worker=True) as yard:
            await yard.api().start("SAY x", **SCRIPTED)
            await loading.wait()
        row = await database.fetch_one("SELECT status FROM runs")
        assert row == {"status": "queued"}
        await nothing_left(settings, database)


async def nothing_left(settings: Settings, database: Database) -> None:
    assert sandboxes(settings) == []
    assert await database.fetch("SELECT 1 FROM run_cursors WHERE leased_until IS NOT NULL") == []
