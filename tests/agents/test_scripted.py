"""The scripted agent that is shipped: driven by our client, as in a demo."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from acp import schema

from taskyard.agents.acp import AcpError, AgentGoneError, PromptResult
from taskyard.agents.adapters import adapters
from taskyard.agents.options import auto_answer, choose_mode
from taskyard.settings import Settings
from tests.support.acp_agents import Client, connected

Json = dict[str, Any]


class Demo:
    """An open session of the scripted agent in a folder."""

    def __init__(self, client: Client, folder: Path, session_id: str) -> None:
        self.client = client
        self.folder = folder
        self.session_id = session_id

    async def run(self, *lines: str) -> PromptResult:
        blocks = [{"type": "text", "text": "\n".join(lines)}]
        return await self.client.connection.prompt(self.session_id, blocks)

    async def cancel(self) -> None:
        await self.client.connection.cancel(self.session_id)

    def updates(self, kind: str) -> list[Json]:
        found = (params["update"] for params in self.client.updates)
        return [update for update in found if update["sessionUpdate"] == kind]


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Demo]:
    async def allow(method: str, params: Json) -> Json:
        schema.RequestPermissionRequest.model_validate(params)
        if params["toolCall"]["title"] == "forever":
            await asyncio.Event().wait()
        kind = "reject_once" if params["toolCall"]["title"] == "no" else "allow_once"
        return {"outcome": {"outcome": "selected", "optionId": auto_answer(params["options"], [kind])}}

    folder = tmp_path / "work"
    folder.mkdir()
    adapter = adapters(Settings(data_dir=tmp_path))["scripted"]
    async with connected(adapter.argv(), on_request=allow, cwd=folder) as client:
        answer = await client.connection.initialize()
        assert "stand-in" in schema.InitializeResponse.model_validate(answer).agent_info.title  # type: ignore[union-attr, operator]
        session = await client.connection.new_session(str(folder))
        schema.NewSessionResponse.model_validate(session.raw)
        mode = choose_mode(session, *adapter.wanted_modes(None))
        assert mode == "bypassPermissions"
        await client.connection.set_mode(session.id, mode)
        yield Demo(client, folder, session.id)
        for params in client.updates:
            schema.SessionNotification.model_validate(params)


async def test_directives_in_order(demo: Demo) -> None:
    result = await demo.run(
        "Some words that are no directive.",
        "PLAN look | change",
        "THINK hm",
        "WRITE src/a.txt one\\ntwo",
        "SHELL cat src/a.txt; exit 3",
        'OUTPUT {"ok": true}',
        "USAGE 100 20",
        "SAY bye",
    )
    assert result.stop_reason == "end_turn"
    assert result.usage == {"inputTokens": 100, "outputTokens": 20, "totalTokens": 120}
    assert (demo.folder / "src/a.txt").read_text() == "one\ntwo"
    kinds = [params["update"]["sessionUpdate"] for params in demo.client.updates]
    assert kinds == [
        "plan",
        "agent_thought_chunk",
        "tool_call",
        "tool_call_update",
        "tool_call",
        "tool_call_update",
        "agent_message_chunk",
        "usage_update",
        "agent_message_chunk",
    ]
    written, shell = demo.updates("tool_call_update")
    assert (written["status"], written["content"][0]["newText"]) == ("completed", "one\ntwo")
    assert (shell["status"], shell["rawOutput"]) == ("failed", {"output": "one\ntwo", "exitCode": 3})
    assert demo.client.texts == ['{"ok": true}', "bye"]


async def test_without_directives_it_says_what_it_is(demo: Demo) -> None:
    for request in ("Fix the race\nin the importer", "And the tests"):
        assert (await demo.run(request)).stop_reason == "end_turn"
    notes = (demo.folder / "NOTES.md").read_text()
    assert notes == (
        "# Notes\n\n## Request\n\n> Fix the race\n> in the importer\n\n## Request\n\n> And the tests\n"
    )
    assert all("stand-in without a model" in text for text in demo.client.texts)
    assert len(demo.client.texts) == 2


async def test_commit(demo: Demo) -> None:
    await demo.run("SHELL git init -q .", "WRITE a.txt x", "COMMIT Add a file")
    command = ["git", "-C", str(demo.folder), "log", "--format=%s by %an"]
    log = await asyncio.to_thread(subprocess.check_output, command, text=True)
    assert log == "Add a file by Scripted demo agent\n"


async def test_ask(demo: Demo) -> None:
    await demo.run("ASK yes", "ASK no")
    assert demo.client.texts == ["yes: allow", "no: reject"]
    assert [update["status"] for update in demo.updates("tool_call_update")] == ["completed", "failed"]


@pytest.mark.parametrize("directive", ["SLEEP 300", "SHELL sleep 300 & sleep 300", "ASK forever"])
async def test_cancel_ends_what_takes_long(demo: Demo, directive: str) -> None:
    turn = asyncio.create_task(demo.run("SAY started", directive, "SAY not reached"))
    await demo.client.until(lambda: "started" in demo.client.texts, "the turn's start")
    if not directive.startswith("SLEEP"):
        await demo.client.until(lambda: bool(demo.updates("tool_call")), "the tool call")
    await demo.cancel()
    assert (await turn).stop_reason == "cancelled"
    assert demo.client.texts == ["started"]
    assert (await demo.run("SAY again")).stop_reason == "end_turn"


async def test_a_cancel_right_behind_the_prompt_is_not_lost(demo: Demo) -> None:
    turn = asyncio.create_task(demo.run("SLEEP 300"))
    await demo.client.until(lambda: bool(demo.client.sent("session/prompt")), "the prompt")
    await demo.cancel()
    assert (await turn).stop_reason == "cancelled"


async def test_flood_and_error(demo: Demo) -> None:
    await demo.run("FLOOD 200 5000")
    sizes = {len(update["content"][0]["content"]["text"]) for update in demo.updates("tool_call_update")[:-1]}
    assert sizes == {5000}
    assert len(demo.updates("tool_call_update")) == 201
    with pytest.raises(AcpError, match="no quota"):
        await demo.run("ERROR no quota")
    assert (await demo.run("SAY fine")).stop_reason == "end_turn"


async def test_crash(demo: Demo) -> None:
    with pytest.raises(AgentGoneError):
        await demo.run("CRASH 7")
    assert await demo.client.process.wait() == 7


async def test_hang_outlives_its_input(demo: Demo) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await demo.run("SAY before", "HANG")
    await demo.client.connection.close()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await demo.client.process.wait()
    os.kill(demo.client.process.pid, signal.SIGTERM)
    assert await demo.client.process.wait() == 128 + signal.SIGTERM


async def test_ignore_sigterm(demo: Demo) -> None:
    await demo.run("IGNORE_SIGTERM")
    demo.client.process.terminate()
    assert (await demo.run("SAY alive")).stop_reason == "end_turn"


async def test_it_ends_with_its_input(demo: Demo) -> None:
    await demo.client.connection.close()
    assert await demo.client.process.wait() == 0


async def test_sessions(demo: Demo) -> None:
    connection = demo.client.connection
    session = await connection.load_session("earlier", str(demo.folder))
    assert (session.id, session.current_mode) == ("earlier", "default")
    with pytest.raises(AcpError, match="Unknown mode"):
        await connection.set_mode("earlier", "yolo")
    await connection.close_session("earlier")
    for call in (connection.prompt("earlier", []), connection.close_session("earlier")):
        with pytest.raises(AcpError, match="Unknown session"):
            await call


async def test_it_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    """Run from a copy, alone in a folder, with Python's isolated mode and no site packages."""
    source = Path(adapters(Settings(data_dir=tmp_path))["scripted"].command[-1])
    copy = tmp_path / "scripted.py"
    copy.write_bytes(source.read_bytes())
    request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}}) + "\n"
    command = ["python3", "-I", "-S", str(copy)]
    answer = await asyncio.to_thread(
        subprocess.run, command, input=request, capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout)["result"]["protocolVersion"] == 1
