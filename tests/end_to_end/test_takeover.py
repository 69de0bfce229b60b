"""A worker process is killed in the middle of a turn; another one, elsewhere, brings the work to its end.

The agents are the real ones, and the scripted one; only the paid model is stood in for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from taskyard.db.engine import Database
from taskyard.settings import RateLimitSettings, Settings
from tests.conftest import make_settings
from tests.support.git_http import git_server
from tests.support.model_endpoint import Endpoint, model_endpoint
from tests.support.processes import agents_of
from tests.support.repositories import commit_file, make_bare, make_repository, run_git
from tests.support.site import running_worker_process
from tests.support.yard import Run, Yard, eventually, of_method, ok, open_yard, said

MODELS = {
    "claude": {"runtime_adapter": "claude", "model": "claude-sonnet-4-6"},
    "codex": {"runtime_adapter": "codex", "model": "gpt-5.5"},
    "scripted": {"agent": "scripted"},
}
REAL = "[[write:first.txt|one]] [[slow:6]] [[write:second.txt|two]] [[text:All done.]]"
PROMPTS = {
    "claude": REAL,
    "codex": REAL,
    "scripted": "WRITE first.txt one\nSLEEP 6\nWRITE second.txt two\nSAY All done.",
}


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with model_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return make_settings(tmp_path / "api", database_url, rate_limits=RateLimitSettings(enabled=False))


@pytest.fixture
async def yard(settings: Settings, database: Database) -> AsyncIterator[Yard]:
    async with open_yard(settings, database) as yard:
        yield yard


@pytest.fixture
def crew(tmp_path: Path, database_url: str, endpoint: Endpoint) -> Iterator[Crew]:
    with ExitStack() as stack:
        yield Crew(tmp_path, database_url, endpoint.url, stack)


class Crew:
    """Worker processes, each with a data folder of its own; what they store is shared, as by S3."""

    def __init__(self, folder: Path, database_url: str, models: str, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._env = {
            "TASKYARD_DATABASE_URL": database_url,
            "TASKYARD_RUNS__CHECKPOINT_S": "0.5",
            "TASKYARD_MODELS__ANTHROPIC__BASE_URL": models,
            "TASKYARD_MODELS__ANTHROPIC__API_KEY": "sk-outside",
            "TASKYARD_MODELS__OPENAI__BASE_URL": models,
            "TASKYARD_MODELS__OPENAI__API_KEY": "sk-outside",
        }

    def start(self, name: str, **env: str) -> subprocess.Popen[bytes]:
        data_dir = self._folder / name
        data_dir.mkdir()
        installed = os.environ.get("TASKYARD_TEST_DATA_DIR")
        if installed is None:
            pytest.fail("TASKYARD_TEST_DATA_DIR is not set: run these tests by scripts/test")
        (data_dir / "agents").symlink_to(Path(installed) / "agents")
        objects = self._folder / "api" / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        (data_dir / "objects").symlink_to(objects)
        return self._stack.enter_context(running_worker_process(data_dir, **{**self._env, **env}))


@pytest.mark.parametrize("agent", ["scripted", "claude", "codex"])
async def test_a_killed_worker(
    yard: Yard, crew: Crew, tmp_path: Path, database: Database, endpoint: Endpoint, agent: str
) -> None:
    shop = make_repository(tmp_path / "shop")
    name = ok(await yard.api().post("repositories/", {"origin": str(shop)}), 201)["name"]
    first = crew.start("first")
    run = await yard.api().start(PROMPTS[agent], repository=name, **MODELS[agent])
    await run.shown("first.txt")
    # Agents write their sessions a moment after they tell of what they do.
    [now] = await database.fetch("SELECT clock_timestamp() AS at")
    await eventually(
        lambda: database.fetch(
            "SELECT 1 FROM checkpoints WHERE parts ? 'session' AND parts ? 'workspace'"
            " AND at > %(now)s + interval '1.5 seconds'",
            now=now["at"],
        ),
        bool,
        lambda _: "checkpoint",
    )
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    crew.start("second")
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
    branch = body["output"]["head_branch"]
    for file, text in (("first.txt", "one"), ("second.txt", "two")):
        assert run_git(shop, "show", f"{branch}:{file}").strip() == text
    log = await run.log()
    assert "All done." in said(log)
    [resumed] = of_method(log, "_posthog/session/resume")
    assert resumed["loaded"] is True
    assert len(of_method(log, "_posthog/turn_complete")) == 1
    seen = [int(event_id.rpartition("-")[2]) for event_id, _ in await run.stream()]
    assert seen == sorted(set(seen))
    assert agents_of(run.id) == []
    if agent != "scripted":
        # The model is told what was said and done before: it is the same session.
        assert json.dumps(endpoint.model_calls()[-1].body).count("first.txt") > 1


async def test_a_message_half_told_is_in_the_log(yard: Yard, crew: Crew) -> None:
    """The stream has shown it, so the log has it, too: once, and before what the next worker brings."""
    first = crew.start("first")
    text = "WRITE a.txt a\nSAY Half told.\nSLEEP 6\nSAY All done."
    run = await yard.api().start(text, mode="interactive", **MODELS["scripted"])
    await run.shown("told.")
    assert "Half told." not in said(await run.log())
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    crew.start("second")
    await run.turns(1)
    log = await run.log()
    assert said(log).count("Half told.") == 1
    told = [
        entry for entry in log if "Half told." in json.dumps(entry) and "agent_message" in json.dumps(entry)
    ]
    assert log.index(told[0]) < log.index(next(e for e in log if "_posthog/session/resume" in json.dumps(e)))
    await run.cancel()


@pytest.mark.parametrize("base", ["stays", "moves on"])
async def test_what_was_pushed_after_the_checkpoint_stays(
    yard: Yard, crew: Crew, tmp_path: Path, base: str
) -> None:
    (tmp_path / "served" / "acme").mkdir(parents=True)
    bare = make_bare(tmp_path / "served" / "acme" / "shop.git", make_repository(tmp_path / "source"))
    with git_server(tmp_path / "served") as server:
        name = ok(await yard.api().post("repositories/", {"origin": f"{server.url}/acme/shop.git"}), 201)[
            "name"
        ]
        late = {"TASKYARD_RUNS__CHECKPOINT_S": "3600"}
        first = crew.start("first", **late)
        push = (
            'SHELL git push origin "HEAD:refs/heads/taskyard/tes-0-$(echo $POSTHOG_TASK_RUN_ID | cut -c1-8)"'
        )
        text = f"WRITE a.txt one\nCOMMIT first\n{push}\nSLEEP 60"
        run = await yard.api().start(text, repository=name, **MODELS["scripted"])
        branch = f"taskyard/tes-0-{run.id[:8]}"
        pushed = await eventually(lambda: branch_of(bare, branch), bool, lambda _: "push")
        first.send_signal(signal.SIGKILL)
        first.wait(60)
        if base == "moves on":
            commit_file(tmp_path / "source", "other.txt", "other")
            run_git(tmp_path / "source", "push", "--quiet", str(bare), "HEAD:main")
        crew.start("second", **late)
        body = await run.status("completed", "failed")
        assert (body["status"], body["error_message"]) == ("completed", None)
    assert body["output"]["head_branch"] == branch
    assert run_git(bare, "log", "--format=%H", f"main..{branch}").split()[-1] == pushed
    assert run_git(bare, "show", f"{branch}:a.txt").strip() == "one"
    lines = [params["message"] for params in of_method(await run.log(), "_posthog/console")]
    assert f"The workspace goes on from the published commit {pushed[:12]}." in lines


async def test_a_worker_killed_before_the_first_checkpoint_of_a_resumed_run(
    yard: Yard, crew: Crew, tmp_path: Path
) -> None:
    """What the run resumes is all there is of it: the next worker takes that again."""
    name = ok(
        await yard.api().post("repositories/", {"origin": str(make_repository(tmp_path / "shop"))}), 201
    )["name"]
    late = {"TASKYARD_RUNS__CHECKPOINT_S": "3600"}
    first = crew.start("first", **late)
    one = await yard.api().start("WRITE a.txt one\nSAY one", repository=name, **MODELS["scripted"])
    await one.status("completed")
    body = {"resume_from_run_id": one.id, "pending_user_message": "SAY begun\nSLEEP 60", **MODELS["scripted"]}
    task = ok(await yard.api().post(f"tasks/{one.task_id}/run/", {**body, "mode": "interactive"}))
    two = Run(yard.api(), one.task_id, task["latest_run"]["id"])
    await two.shown("begun")
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    crew.start("second", **late)
    await eventually(
        two.log,
        lambda log: len(of_method(log, "_posthog/session/resume")) == 2,
        lambda log: f"a second start in {log[-3:]}",
    )
    await two.command("steer", content="SHELL cat a.txt\nSAY done")
    log = await eventually(two.log, lambda log: "done" in said(log), lambda log: f"an answer in {log[-3:]}")
    assert [resumed["loaded"] for resumed in of_method(log, "_posthog/session/resume")] == [True, True]
    assert '"output": "one"' in await two.stream_text()
    await two.cancel()


async def branch_of(bare: Path, branch: str) -> str:
    return run_git(bare, "for-each-ref", "--format=%(objectname)", f"refs/heads/{branch}").strip()
