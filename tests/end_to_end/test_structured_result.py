"""The structured result of a run: given by the agent's tool, or as its last message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskyard import dispatch
from taskyard.agents.adapters import adapters
from taskyard.db.engine import Database
from taskyard.settings import AgentSettings, RunSettings, Settings, WorkerSettings
from taskyard.worker import running_worker
from tests.conftest import make_settings
from tests.support.repositories import run_git
from tests.support.yard import Run, Yard, eventually, of_method, ok, said, updates

SCRIPTED = {"agent": "scripted"}
ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}
ITEMS = {"$defs": {"item": {"type": "string"}}, "type": "array", "items": {"$ref": "#/$defs/item"}}


async def start(live: Yard, script: str, schema: Any, repository: str | None = None, **body: Any) -> Run:
    api = live.api()
    task = await api.create_task(description=script, json_schema=schema, repository=repository)
    started = ok(await api.post(f"tasks/{task['id']}/run/", {**SCRIPTED, **body}))
    return Run(api, task["id"], started["latest_run"]["id"])


def answers(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Status and text of each call of the tool."""
    calls = {call["toolCallId"] for call in updates(log, "tool_call") if call["title"] == "submit_result"}
    return [
        (update["status"], update["content"][0]["content"]["text"])
        for update in updates(log, "tool_call_update")
        if update["toolCallId"] in calls
    ]


@pytest.mark.parametrize("mode", ["background", "interactive"])
async def test_a_result_completes_the_run_and_the_work_is_published(
    live: Yard, shop: Path, repository: str, mode: str
) -> None:
    script = 'WRITE a.txt one\nSUBMIT {"answer": 42}\nWRITE b.txt two\nSAY done'
    run = await start(live, script, ANSWER, repository, mode=mode)
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"], body["output"]) == ("completed", None, {"answer": 42})
    # What follows in the turn is not cut off.
    assert run_git(shop, "show", f"{body['branch']}:a.txt") == "one"
    assert run_git(shop, "show", f"{body['branch']}:b.txt") == "two"
    log = await run.log()
    assert [status for status, _ in answers(log)] == ["completed"]
    assert said(log).endswith("done")
    assert [turn["stopReason"] for turn in of_method(log, "_posthog/turn_complete")] == ["end_turn"]
    # The user's message is recorded as the user wrote it.
    assert [update["content"]["text"] for update in updates(log, "user_message_chunk")] == [script]


async def test_an_agent_may_try_again_and_the_last_that_fits_counts(live: Yard) -> None:
    script = "\n".join(
        f"SUBMIT {json.dumps(value)}"
        for value in ({"answer": "many"}, {}, {"answer": 1}, {"answer": 2}, {"answer": 3.5})
    )
    run = await start(live, script, ANSWER)
    assert (await run.status("completed", "failed"))["output"] == {"answer": 2}
    told = answers(await run.log())
    assert [status for status, _ in told] == ["failed", "failed", "completed", "completed", "failed"]
    assert told[0][1] == "The result was not taken. $.answer: 'many' is not of type 'integer'"
    assert told[1][1] == "The result was not taken. $: 'answer' is a required property"


async def test_a_result_that_is_no_object(live: Yard) -> None:
    run = await start(live, 'SUBMIT {"result": ["a", 1]}\nSUBMIT ["x"]\nSAY x', ITEMS, mode="interactive")
    log = await run.turns(1)
    assert answers(log)[0][1] == "The result was not taken. $[1]: 1 is not of type 'string'"
    assert "arguments must be an object" in json.dumps(log)
    assert (await run.fetch())["output"] is None
    await run.command("user_message", content='SUBMIT {"result": ["a", "b"]}')
    assert (await run.status("completed"))["output"] == ["a", "b"]


async def test_without_a_schema_there_is_no_tool(live: Yard) -> None:
    run = await start(live, 'SUBMIT {"answer": 42}\nSHELL env', None)
    body = await run.status("completed", "failed")
    log = await run.log()
    assert (body["status"], body["output"]) == ("completed", None)
    assert answers(log) == [("failed", "no such tool")]


async def test_a_last_message_is_checked_where_it_can_hold_up_nobody(
    live: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*_: Any) -> str:
        raise AssertionError("the worker itself must not check this")

    monkeypatch.setattr("taskyard.json_schema.value_problem_now", here)
    run = await start(live, f'OUTPUT {{"a": "{"a" * 60}!"}}', {"properties": {"a": {"pattern": "^(a+)+$"}}})
    body = await run.status("completed", "failed")
    assert (body["status"], body["output"]) == ("completed", None)


async def test_a_message_that_is_no_json_is_no_result(live: Yard) -> None:
    for text in ("NaN", "1e999", "[" * 500 + "]" * 500):
        run = await start(live, f"OUTPUT {text}", {})
        body = await run.status("completed", "failed")
        assert (body["status"], body["output"]) == ("completed", None), text


@pytest.mark.parametrize("end", ["CRASH 3", "ERROR no more"])
async def test_a_turn_that_breaks_after_the_result(live: Yard, shop: Path, repository: str, end: str) -> None:
    run = await start(live, f'WRITE a.txt one\nSUBMIT {{"answer": 7}}\n{end}', ANSWER, repository)
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"], body["output"]) == ("completed", None, {"answer": 7})
    assert run_git(shop, "show", f"{body['branch']}:a.txt") == "one"
    assert ("no more" if end.startswith("ERROR") else "exit code 3") in json.dumps(await run.log())


async def test_a_turn_that_is_cancelled_after_the_result(live: Yard) -> None:
    run = await start(live, 'SUBMIT {"answer": 7}\nSAY given\nSLEEP 60', ANSWER, mode="interactive")
    await run.shown("given")
    assert (await run.fetch())["status"] == "in_progress"
    assert (await run.command("steer", content="SAY and more"))["result"] == {"queued": True}
    log = await run.turns(2)
    assert [turn["stopReason"] for turn in of_method(log, "_posthog/turn_complete")] == [
        "cancelled",
        "end_turn",
    ]
    body = await run.fetch()
    assert (body["status"], body["output"]) == ("in_progress", {"answer": 7})
    await run.command("user_message", content='SUBMIT {"answer": 8}')
    assert (await run.status("completed"))["output"] == {"answer": 8}


async def test_work_that_cannot_be_published_fails_the_run_and_keeps_its_result(
    live: Yard, shop: Path, repository: str
) -> None:
    hook = shop / ".git" / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    run = await start(live, 'WRITE a.txt one\nSUBMIT {"answer": 7}', ANSWER, repository)
    body = await run.status("completed", "failed")
    assert (body["status"], body["state"].get("error_type")) == ("failed", "publish_failed")
    assert body["output"] == {"answer": 7}


PLAIN_AGENT = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    params, result = message["params"], {}
    if message["method"] == "initialize":
        result = {"protocolVersion": 1, "agentCapabilities": {}}
    elif message["method"] == "session/new":
        result, servers = {"sessionId": "s"}, params["mcpServers"]
    elif message["method"] == "session/prompt":
        text = json.dumps({"prompt": params["prompt"], "servers": servers})
        update = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": text}}
        said = {"method": "session/update", "params": {"sessionId": "s", "update": update}}
        print(json.dumps({"jsonrpc": "2.0", **said}), flush=True)
        result = {"stopReason": "end_turn"}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"""


class TestAgentWithoutHttp:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        plain = make_settings(tmp_path / "data", database_url)
        python = adapters(plain)["scripted"].command[0]
        command = [python, "-c", PLAIN_AGENT]
        return make_settings(
            tmp_path / "data", database_url, agents={"plain": AgentSettings(command=command)}
        )

    async def test_it_does_without_and_its_last_message_counts(self, live: Yard) -> None:
        run = await start(live, "hello", {"type": "object"}, agent="plain")
        body = await run.status("completed", "failed")
        said_to_it = {"prompt": [{"type": "text", "text": "hello"}], "servers": []}
        assert (body["status"], body["error_message"], body["output"]) == ("completed", None, said_to_it)
        text = "The agent takes no MCP servers over http: it does without 'taskyard'."
        assert text in [line["message"] for line in of_method(await run.log(), "_posthog/console")]


class TestAsleep:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        return make_settings(tmp_path / "data", database_url, runs=RunSettings(suspend_after_s=0.2))

    async def test_a_run_that_sleeps_too_long_keeps_its_result(
        self, live: Yard, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dispatch, "SWEEP_S", 0.3)
        run = await start(
            live, 'SUBMIT {"answer": 7}\nASK May I', ANSWER,
            mode="interactive", runtime_adapter="claude", model="claude-sonnet-4-6",
            initial_permission_mode="default",
        )  # fmt: skip
        await eventually(
            run.fetch, lambda body: body["state"].get("suspended") is True, lambda body: f"sleep of {body}"
        )
        await database.execute("UPDATE run_cursors SET due_at = clock_timestamp()")
        body = await run.status("completed", "failed")
        assert (body["status"], body["state"].get("error_type")) == ("failed", "deadline")
        assert body["output"] == {"answer": 7}


class TestAnotherWorker:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str) -> Settings:
        return make_settings(tmp_path / "data", database_url, worker=WorkerSettings(drain_s=0.2))

    async def test_a_result_that_was_taken_outlives_the_worker(
        self, yard: Yard, settings: Settings, database: Database
    ) -> None:
        async with running_worker(settings, database):
            run = await start(yard, 'SUBMIT {"answer": 7}\nSAY given\nSLEEP 5\nSAY end', ANSWER)
            await run.shown("given")
        body = await run.fetch()
        assert (body["status"], body["output"]) == ("in_progress", None)
        async with running_worker(settings, database):
            body = await run.status("completed", "failed")
        assert (body["status"], body["output"]) == ("completed", {"answer": 7})
        log = await run.log()
        assert [status for status, _ in answers(log)] == ["completed"], "it was not asked for again"
        assert said(log).endswith("end")


async def test_an_output_that_a_client_gave_is_not_lost_to_the_branch(
    live: Yard, shop: Path, repository: str
) -> None:
    run = await start(live, "SAY ready", None, repository, mode="interactive")
    await run.turns(1)
    ok(await run.api.patch(run.path("set_output/"), {"output": [1, 2]}))
    await run.command("user_message", content="WRITE a.txt one")
    await run.turns(2)
    body = await run.fetch()
    assert body["output"] == [1, 2]
    assert run_git(shop, "show", f"{body['branch']}:a.txt") == "one"
    await run.cancel()
