"""Runs from the request to the branch, with the scripted agent in a real sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from taskyard.settings import RunSettings
from tests.support.repositories import heads, run_git
from tests.support.yard import Run, Yard, eventually, of_method, ok, said, updates

SCRIPTED = {"agent": "scripted"}


async def test_work_arrives_as_a_branch(live: Yard, shop: Path, repository: str) -> None:
    before = heads(shop)
    run = await live.api().start(
        "THINK hm\nPLAN look|write\nWRITE notes/a.txt one\\ntwo\nSAY done", repository=repository, **SCRIPTED
    )
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
    branch = f"taskyard/tes-0-{run.id[:8]}"
    assert body["output"] == {"head_branch": branch, "commit_sha": heads(shop)[branch]}
    assert (body["branch"], body["state"]["pr_base_branch"]) == (branch, "main")
    assert body["completed_at"]
    # The base branch stands where it stood, and the branch is one commit ahead of it.
    assert heads(shop) == before | {branch: body["output"]["commit_sha"]}
    assert run_git(shop, "show", f"{branch}:notes/a.txt") == "one\ntwo"
    assert run_git(shop, "rev-list", "--count", f"main..{branch}") == "1"
    assert "TES-0" in run_git(shop, "log", "-1", "--format=%B", branch)

    log = await run.log()
    assert [u["content"]["text"] for u in updates(log, "user_message_chunk")] == [
        "THINK hm\nPLAN look|write\nWRITE notes/a.txt one\\ntwo\nSAY done"
    ]
    assert said(log) == "done"
    [plan] = updates(log, "plan")
    assert [entry["content"] for entry in plan["entries"]] == ["look", "write"]
    assert any(
        part["type"] == "diff" and part["newText"] == "one\ntwo"
        for update in updates(log, "tool_call_update")
        for part in update.get("content") or []
    )
    [started] = of_method(log, "_posthog/run_started")
    assert (started["runId"], started["taskId"]) == (run.id, run.task_id)
    assert [turn["stopReason"] for turn in of_method(log, "_posthog/turn_complete")] == ["end_turn"]
    steps = [(p["step"], p["status"]) for p in of_method(log, "_posthog/progress")]
    assert [step for step, status in steps if status == "completed"] == [
        "sandbox",
        "clone",
        "agent",
        "publish",
    ]


async def test_log_and_stream_agree(live: Yard) -> None:
    run = await live.api().start("SAY one\nSHELL echo out\nSAY two", **SCRIPTED)
    await run.status("completed")
    events = await run.stream()
    ids = [event_id for event_id, _ in events]
    assert len(set(ids)) == len(ids)
    streamed = [json.dumps(event) for _, event in events]
    response = await live.api().get(run.path("logs/"))
    logged = response.text.splitlines()
    only_logged = [line for line in logged if line not in streamed]
    # Byte for byte the same, but for the joined text, whose chunks are on the stream.
    assert [json.loads(line)["notification"]["params"]["update"]["sessionUpdate"] for line in only_logged] == [
        "agent_message", "agent_message",
    ]  # fmt: skip
    assert [line for line in streamed if line in logged] == [line for line in logged if line in streamed]
    states = [event["status"] for _, event in events if event["type"] == "task_run_state"]
    assert (states[0], states[1], states[-1]) == ("queued", "in_progress", "completed")
    assert await run.stream(last_event_id=ids[4]) == events[5:]


async def test_a_live_reader_sees_everything_once(live: Yard) -> None:
    api = live.api()
    task = await api.create_task(description="SAY a\nSLEEP 0.3\nSAY b\nFLOOD 300 2000\nSAY c")
    started = ok(await api.post(f"tasks/{task['id']}/run/", SCRIPTED))["latest_run"]
    run = Run(api, task["id"], started["id"])
    live_events = await run.stream()
    assert live_events == await run.stream()
    assert len(live_events) > 300


@pytest.mark.parametrize(
    ("script", "error_type", "text"),
    [
        ("SAY before\nERROR out of tokens", "agent_error", "out of tokens"),
        ("SAY before\nCRASH 7", "agent_crashed", "exit code 7"),
    ],
)
async def test_failures(live: Yard, script: str, error_type: str, text: str) -> None:
    run = await live.api().start(script, **SCRIPTED)
    body = await run.status("failed", "completed")
    assert body["state"].get("error_type") == error_type
    assert text in body["error_message"]
    assert body["completed_at"]
    assert "before" in said(await run.log())
    assert (await run.stream())[-1][1]["status"] == "failed"


async def test_work_of_a_crashed_agent_is_not_lost(live: Yard, shop: Path, repository: str) -> None:
    run = await live.api().start("WRITE half.txt done\nCRASH 1", repository=repository, **SCRIPTED)
    body = await run.status("failed")
    assert body["state"]["error_type"] == "agent_crashed"
    assert run_git(shop, "show", f"{body['output']['head_branch']}:half.txt") == "done"


class TestSilence:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(agent_silence_s=3.0)

    async def test_a_hanging_agent(self, live: Yard) -> None:
        run = await live.api().start("IGNORE_SIGTERM\nSAY before\nHANG", **SCRIPTED)
        body = await run.status("failed", "completed")
        assert body["state"]["error_type"] == "agent_silent"
        assert "3 seconds" in body["error_message"]
        await run.stream()
        await no_process_of(run)

    async def test_waiting_for_a_person_is_no_silence(self, live: Yard) -> None:
        run = await live.api().start(
            "ASK May I", mode="interactive", runtime_adapter="claude", model="claude-sonnet-4-6",
            initial_permission_mode="default", **SCRIPTED,
        )  # fmt: skip
        log = await run.logged("_posthog/permission_request")
        [request] = of_method(log, "_posthog/permission_request")
        await asyncio.sleep(4)  # longer than the agent may be silent
        wrong = await run.command("permission_response", requestId=request["requestId"], optionId="perhaps")
        assert "unknown optionId" in wrong["error"]["message"]
        right = await run.command("permission_response", requestId=request["requestId"], optionId="reject")
        assert right["result"] == {"resolved": True}
        assert "May I: reject" in said(await run.turns(1))
        again = await run.command("permission_response", requestId=request["requestId"], optionId="allow")
        assert "no such permission request" in again["error"]["message"]
        await run.cancel()


async def test_permission_is_given_when_nobody_is_there(live: Yard) -> None:
    run = await live.api().start("ASK May I", **SCRIPTED)
    await run.status("completed")
    assert said(await run.log()) == "May I: allow"


async def test_cancel_of_the_run(live: Yard, shop: Path, repository: str) -> None:
    run = await live.api().start("WRITE x y\nSAY working\nSHELL sleep 60", repository=repository, **SCRIPTED)
    await run.shown("sleep 60")
    body = await run.cancel()
    assert body["status"] == "cancelled"
    events = await run.stream()
    assert [e["status"] for _, e in events if e["type"] == "task_run_state"][-1] == "cancelled"
    assert (await run.fetch())["error_message"] is None
    assert list(heads(shop)) == ["main"]
    await no_process_of(run)


async def test_cancel_of_the_turn(live: Yard) -> None:
    run = await live.api().start("SAY before\nSLEEP 60\nSAY never", mode="interactive", **SCRIPTED)
    await run.logged("session/prompt")
    await run.shown("before")
    assert (await run.command("cancel"))["result"] == {"cancelled": True}
    log = await run.turns(1)
    assert of_method(log, "_posthog/turn_complete")[0]["stopReason"] == "cancelled"
    assert (await run.fetch())["status"] == "in_progress"
    await run.command("user_message", content="SAY after")
    assert said(await run.turns(2)).endswith("after")
    await run.cancel()


async def test_messages_while_busy_wait_in_order(live: Yard) -> None:
    run = await live.api().start("SAY zero\nSLEEP 1", mode="interactive", **SCRIPTED)
    await run.logged("session/prompt")
    for number in ("one", "two", "three"):
        answer = await run.command("user_message", content=f"SAY {number}")
        assert answer["result"] == {"queued": True}
    assert said(await run.turns(4)).split() == ["zero", "one", "two", "three"]
    assert (await run.fetch())["status"] == "in_progress"
    await run.cancel()


async def test_a_background_run_drains_its_mailbox_first(live: Yard) -> None:
    run = await live.api().start("SAY zero\nSLEEP 1", **SCRIPTED)
    await run.logged("session/prompt")
    await run.command("user_message", content="SAY one")
    await run.status("completed")
    assert said(await run.log()).split() == ["zero", "one"]


async def test_each_turn_is_published(live: Yard, shop: Path, repository: str) -> None:
    run = await live.api().start("WRITE a 1", mode="interactive", repository=repository, **SCRIPTED)
    await run.turns(1)
    first = (await run.fetch())["output"]
    await run.command("user_message", content="WRITE b 2\nCOMMIT second")
    await run.turns(2)
    second = (await run.fetch())["output"]
    assert first["head_branch"] == second["head_branch"]
    assert run_git(shop, "rev-parse", f"{second['commit_sha']}~1") == first["commit_sha"]
    assert run_git(shop, "ls-tree", "--name-only", second["head_branch"]).split() == ["README.md", "a", "b"]
    await run.command("user_message", content="SAY nothing new")
    await run.turns(3)
    assert (await run.fetch())["output"] == second
    await run.cancel()


async def test_pending_message_goes_first_and_once(live: Yard) -> None:
    api = live.api()
    task = await api.create_task(description="SAY from description")
    body = {"pending_user_message": "SAY from message", **SCRIPTED}
    started = ok(await api.post(f"tasks/{task['id']}/run/", body))["latest_run"]
    run = Run(api, task["id"], started["id"])
    done = await run.status("completed")
    assert "pending_user_message" not in done["state"]
    assert said(await run.log()) == "from message"


async def test_nothing_to_say_waits_for_a_message(live: Yard) -> None:
    run = await live.api().start("", **SCRIPTED)
    await run.logged("_posthog/run_started")
    assert (await run.fetch())["status"] == "in_progress"
    await run.command("user_message", content="SAY at last")
    await run.status("completed")
    assert said(await run.log()) == "at last"


async def test_structured_output(live: Yard) -> None:
    api = live.api()
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    task = await api.create_task(description='SAY thinking\nOUTPUT {"answer": 42}', json_schema=schema)
    started = ok(await api.post(f"tasks/{task['id']}/run/", {"mode": "interactive", **SCRIPTED}))[
        "latest_run"
    ]
    body = await Run(api, task["id"], started["id"]).status("completed")
    assert body["output"] == {"answer": 42}


async def test_a_flood_of_output(live: Yard) -> None:
    run = await live.api().start("FLOOD 2000 5000\nSAY survived", **SCRIPTED)
    await run.status("completed")
    log = await run.log()
    assert said(log) == "survived"
    floods = [json.dumps(u) for u in updates(log, "tool_call_update") if "flood " in json.dumps(u)]
    assert len(floods) == 2000


async def test_two_runs_do_not_meet(live: Yard) -> None:
    api = live.api()
    script = "SHELL echo mine > here; sleep 1; ls /tmp/workspace; ps -e | wc -l"
    one, two = await asyncio.gather(
        *(api.start(f"WRITE {name} x\n{script}", **SCRIPTED) for name in ("one", "two"))
    )
    for run, mine, other in ((one, "one", "two"), (two, "two", "one")):
        await run.status("completed")
        text = json.dumps(updates(await run.log(), "tool_call_update"))
        assert mine in text
        assert f"\\n{other}\\n" not in text


async def test_twenty_runs_in_the_queue(live: Yard) -> None:
    api = live.api()
    runs = await asyncio.gather(*(api.start(f"SAY run {n}", **SCRIPTED) for n in range(20)))
    for n, run in enumerate(runs):
        assert (await run.status("completed", "failed"))["status"] == "completed"
        assert said(await run.log()) == f"run {n}"


async def test_unknown_branch_fails_at_once(live: Yard, repository: str) -> None:
    run = await live.api().start("SAY x", repository=repository, branch="nowhere", **SCRIPTED)
    body = await run.status("failed")
    assert body["state"]["error_type"] == "clone_failed"
    assert "Failed to checkout branch nowhere" in body["error_message"]


async def test_base_branch(live: Yard, shop: Path, repository: str) -> None:
    run_git(shop, "branch", "release")
    run = await live.api().start("WRITE fix y", repository=repository, branch="release", **SCRIPTED)
    body = await run.status("completed")
    assert body["state"]["pr_base_branch"] == "release"
    assert run_git(shop, "rev-list", "--count", f"release..{body['branch']}") == "1"


async def test_a_run_cancelled_in_the_queue_never_starts(live: Yard) -> None:
    api = live.api()
    busy = [await api.start("SLEEP 3", **SCRIPTED) for _ in range(8)]
    run = await api.start("SAY never", **SCRIPTED)
    await run.cancel()
    for other in busy:
        await other.status("completed")
    assert said(await run.log()) == ""
    assert (await run.fetch())["status"] == "cancelled"


class TestDeadlines:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(inactivity_s=1.0, wall_clock_s=5.0)

    async def test_inactivity_completes(self, live: Yard) -> None:
        run = await live.api().start("SAY hello", mode="interactive", **SCRIPTED)
        body = await run.status("completed", "failed")
        assert (body["status"], body["error_message"]) == ("completed", "Run timed out due to inactivity")
        assert body["state"]["timed_out_inactivity"] is True

    async def test_wall_clock_fails(self, live: Yard) -> None:
        run = await live.api().start("SLEEP 60", **SCRIPTED)
        body = await run.status("failed")
        assert body["state"]["error_type"] == "deadline"


class TestInactivityMode:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(background_end="inactivity")

    async def test_the_end_of_a_turn_ends_nothing(self, live: Yard) -> None:
        run = await live.api().start("SAY first", **SCRIPTED)
        await run.turns(1)
        await run.command("user_message", content="SAY second")
        assert said(await run.turns(2)).split() == ["first", "second"]
        assert (await run.fetch())["status"] == "in_progress"
        ok(await live.api().patch(run.path(), {"status": "completed"}))
        await run.stream()
        assert (await run.fetch())["status"] == "completed"


async def no_process_of(run: Run) -> None:
    """Wait until nothing runs any more that has the run's id in its environment, as the agent and its children do."""

    async def running() -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if run.id.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found

    await eventually(running, lambda found: not found, lambda found: f"end of {found}")
