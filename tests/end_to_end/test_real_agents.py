"""The real Claude Code and the real Codex, in real sandboxes, on a real repository.

Only the paid model is stood in for, by the scripted endpoint of tests/support/model_endpoint.py: the
agents' own programs, their adapters, the gateway, the sandbox and git are the real ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskyard.agents.adapters import adapters
from taskyard.db.engine import Database
from taskyard.settings import ModelSettings, RateLimitSettings, Settings, Upstream
from tests.conftest import make_settings
from tests.support.model_endpoint import INPUT_TOKENS, OUTPUT_TOKENS, Endpoint, model_endpoint
from tests.support.repositories import commit_file, heads, run_git
from tests.support.yard import Run, Yard, eventually, of_method, ok, open_yard, said, updates

KEY = "sk-real-key-that-stays-outside"
MODELS = {
    "claude": {"runtime_adapter": "claude", "model": "claude-sonnet-4-6"},
    "codex": {"runtime_adapter": "codex", "model": "gpt-5.5"},
}
both = pytest.mark.parametrize("agent", ["claude", "codex"])


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with model_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def settings(tmp_path: Path, database_url: str, endpoint: Endpoint) -> Settings:
    upstream = Upstream(base_url=endpoint.url, api_key=KEY)
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    settings = make_settings(
        data_dir,
        database_url,
        models=ModelSettings(anthropic=upstream, openai=upstream),
        rate_limits=RateLimitSettings(enabled=False),  # waiting asks often
    )
    installed = os.environ.get("TASKYARD_TEST_DATA_DIR")
    if installed is None:
        pytest.fail(
            "TASKYARD_TEST_DATA_DIR is not set: run these tests by scripts/test, which installs the agents"
        )
    (data_dir / "agents").symlink_to(Path(installed) / "agents")
    missing = [name for name in MODELS if not adapters(settings)[name].installed]
    if missing:
        pytest.fail(f"not installed below {installed}: {missing}; scripts/test installs them")
    return settings


@pytest.fixture
async def live(settings: Settings, database: Database) -> AsyncIterator[Yard]:
    async with open_yard(settings, database, worker=True) as yard:
        yield yard


@both
async def test_an_edit_becomes_a_branch(
    live: Yard, shop: Path, repository: str, endpoint: Endpoint, agent: str
) -> None:
    prompt = (
        "Please help. [[write:notes.txt|made by the agent]] [[bash:env; cat notes.txt]] [[text:All done.]]"
    )
    run = await live.api().start(prompt, repository=repository, **MODELS[agent])
    body = await run.status("completed", "failed")
    assert body["status"] == "completed", body["error_message"]

    branch = body["output"]["head_branch"]
    assert run_git(shop, "show", f"{branch}:notes.txt").strip() == "made by the agent"
    assert run_git(shop, "rev-list", "--count", f"main..{branch}") == "1"
    assert set(heads(shop)) == {"main", branch}

    log = await run.log()
    assert "All done." in said(log)
    events = await run.stream()
    assert of_method(log, "_posthog/turn_complete")[0]["stopReason"] == "end_turn"
    streamed = {json.dumps(event) for _, event in events}
    only_logged = [entry for entry in log if json.dumps(entry) not in streamed]
    assert {entry["notification"]["params"]["update"]["sessionUpdate"] for entry in only_logged} <= {
        "agent_message", "agent_thought_chunk",
    }  # fmt: skip

    # The key was added on the host, to every call, and is seen nowhere else.
    calls = endpoint.model_calls()
    assert calls
    for call in calls:
        assert KEY in (
            call.headers.get("x-api-key", ""),
            call.headers.get("authorization", "").removeprefix("Bearer "),
        )
    text = json.dumps([log, events, body])
    assert "taskyard-gateway" in text  # the dummy that stands inside in its place, shown by `env`
    assert KEY not in text

    used = body["state"]["token_usage"]
    assert used["model_calls"] == len(calls)
    assert used["output_tokens"] == OUTPUT_TOKENS * len(calls)
    assert used["input_tokens"] >= INPUT_TOKENS


@both
async def test_a_refused_model_call_fails_the_run(live: Yard, agent: str) -> None:
    run = await live.api().start("[[error:400|no such luck]]", **MODELS[agent])
    body = await run.status("failed", "completed")
    assert body["state"].get("error_type") == "agent_error", body
    assert "no such luck" in body["error_message"]
    assert KEY not in json.dumps([body, await run.log()])


@both
async def test_follow_up_in_the_same_session(live: Yard, endpoint: Endpoint, agent: str) -> None:
    run = await live.api().start("[[text:My word is walnut.]]", mode="interactive", **MODELS[agent])
    await run.turns(1)
    await run.command("user_message", content="[[text:And now?]]")
    log = await run.turns(2)
    assert [part for part in ("walnut", "And now?") if part in said(log)] == ["walnut", "And now?"]
    # The second call carries the first turn: it is one conversation.
    assert "walnut" in json.dumps(endpoint.model_calls()[-1].body)
    await run.cancel()


@both
async def test_cancel_of_a_turn(live: Yard, agent: str) -> None:
    run = await live.api().start("[[slow:60]]", mode="interactive", **MODELS[agent])
    await streaming(run)
    assert (await run.command("cancel"))["result"] == {"cancelled": True}
    log = await run.turns(1)
    assert of_method(log, "_posthog/turn_complete")[0]["stopReason"] == "cancelled"
    await run.command("user_message", content="[[text:Still here.]]")
    assert "Still here." in said(await run.turns(2))
    await run.cancel()


@both
async def test_tool_calls_are_recorded(live: Yard, agent: str) -> None:
    run = await live.api().start("[[bash:echo out$((40+2))]] [[text:done]]", **MODELS[agent])
    await run.status("completed")
    log = await run.log()
    assert updates(log, "tool_call")
    assert "out42" in json.dumps(updates(log, "tool_call_update"))


async def streaming(run: Run) -> None:
    await eventually(
        run.stream_text, lambda text: "agent_message_chunk" in text, lambda text: f"chunk in {text[-500:]}"
    )


MCP = r"""
import json, os, sys
for line in sys.stdin:
    message = json.loads(line)
    answer = {}
    if message.get("method") == "initialize":
        answer = {"protocolVersion": message["params"]["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "shelf", "version": "1"}}
    elif message.get("method") == "tools/list":
        answer = {"tools": [{"name": "count", "description": "Counts books.",
                             "inputSchema": {"type": "object", "properties": {"shelf": {"type": "string"}}}}]}
    elif message.get("method") == "tools/call":
        open("/tmp/workspace/called", "a").write(json.dumps(message["params"]["arguments"]))
        text = "books: 41, greeting " + os.environ["GREETING"] + ", " + sys.argv[1]
        answer = {"content": [{"type": "text", "text": text}]}
    if "id" in message:
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": answer}), flush=True)
"""


@both
async def test_an_environment_brings_tools(live: Yard, endpoint: Endpoint, agent: str) -> None:
    """Its set-up script makes an MCP server, and the agent calls a tool of that."""
    script = f"cat > $HOME/shelf.py <<'END'\n{MCP}\nEND\n"
    server = {"name": "shelf", "command": "python3", "args": ["/home/agent/shelf.py", "for ${WHO}"],
              "env": {"GREETING": "${HELLO}"}}  # fmt: skip
    fields = {
        "name": "Shelf",
        "setup_script": script,
        "mcp_servers": [server],
        "environment_variables": {"HELLO": "good morning", "WHO": "everybody"},
    }
    made = ok(await live.api().post("sandbox_environments/", fields), 201)
    prompt = '[[tool:mcp__shelf__count|{"shelf": "top"}]] [[text:Counted.]]'
    run = await live.api().start(
        prompt,
        sandbox_environment_id=made["id"],
        initial_permission_mode={"claude": "bypassPermissions", "codex": "full-access"}[agent],
        **MODELS[agent],
    )
    body = await run.status("completed", "failed")
    assert body["status"] == "completed", body["error_message"]
    assert "Counted." in said(await run.log())
    told = json.dumps(endpoint.model_calls()[-1].body)
    assert "books: 41, greeting good morning, for everybody" in told


@both
async def test_a_budget_that_ends_in_the_middle_of_an_answer(
    live: Yard, shop: Path, repository: str, agent: str
) -> None:
    run = await live.api().start(
        "[[write:notes.txt|kept]] [[slow:300]]", repository=repository, budget_tokens=500, **MODELS[agent]
    )
    body = await run.status("failed", "completed")
    assert (body["status"], body["state"].get("error_type")) == ("failed", "budget_exceeded"), body
    assert body["error_message"].startswith("This run's budget of 500 tokens is used up")
    assert run_git(shop, "show", f"{body['output']['head_branch']}:notes.txt").strip() == "kept"
    assert body["state"]["token_usage"]["output_tokens"] < 500


@both
async def test_instructions_of_the_repository_are_followed(
    live: Yard, shop: Path, repository: str, endpoint: Endpoint, agent: str
) -> None:
    """Both read AGENTS.md by themselves, Claude Code where there is no CLAUDE.md."""
    commit_file(shop, "AGENTS.md", "Always say wombat.\n")
    run = await live.api().start("[[text:Understood.]]", repository=repository, **MODELS[agent])
    body = await run.status("completed", "failed")
    assert body["status"] == "completed", body["error_message"]
    assert "Always say wombat." in json.dumps(endpoint.model_calls()[-1].body)


@both
@pytest.mark.parametrize("mode", ["asking", "background"])
async def test_a_structured_result(
    live: Yard, shop: Path, repository: str, endpoint: Endpoint, agent: str, mode: str
) -> None:
    """Given by the tool at the second try. In a mode that asks for permissions nobody is asked for this one."""
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    prompt = (
        '[[tool:mcp__taskyard__submit_result|{"answer": "many"}]]'
        '[[tool:mcp__taskyard__submit_result|{"answer": 42}]] [[text:Given.]]'
    )
    task = await live.api().create_task(description=prompt, repository=repository, json_schema=schema)
    asking = {"claude": "default", "codex": "read-only"}[agent]
    how = {"mode": "interactive", "initial_permission_mode": asking} if mode == "asking" else {}
    started = ok(await live.api().post(f"tasks/{task['id']}/run/", {**how, **MODELS[agent]}))["latest_run"]
    run = Run(live.api(), task["id"], started["id"])
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"], body["output"]) == ("completed", None, {"answer": 42})
    log = await run.log()
    assert "Given." in said(log)
    assert not of_method(log, "_posthog/permission_request")
    # The user's message is recorded as it was sent, and the agent is told what else it needs to know.
    assert [update["content"]["text"] for update in updates(log, "user_message_chunk")] == [prompt]
    told = json.dumps(endpoint.model_calls()[-1].body)
    assert "this task ends with a structured result" in told
    assert "The result was not taken. $.answer: 'many' is not of type 'integer'" in told
    assert "The result was taken." in told
    assert not [
        entry["message"] for entry in of_method(log, "_posthog/console") if "refused" in entry["message"]
    ]
