"""What of an environment reaches an agent: a whole server, a real sandbox, the scripted agent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from taskyard.db.engine import Database
from taskyard.jobs import enqueue_drive
from taskyard.settings import RunSettings, Settings
from tests.conftest import make_settings
from tests.support.yard import Json, Run, Yard, of_method, ok, open_yard

SCRIPT = "SHELL env | sort"
SCRIPTED = {"agent": "scripted"}


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return make_settings(tmp_path / "data", database_url, runs=RunSettings(setup_s=3))


@pytest.fixture
async def live(settings: Settings, database: Database) -> AsyncIterator[Yard]:
    settings.data_dir.mkdir(mode=0o700)
    async with open_yard(settings, database, worker=True) as yard:
        yield yard


async def environment(yard: Yard, **fields: Any) -> str:
    made = ok(await yard.api().post("sandbox_environments/", {"name": "Build", **fields}), 201)
    return str(made["id"])


def notes(log: list[Json]) -> list[str]:
    found = [entry["message"] for entry in of_method(log, "_posthog/console")]
    return [text for text in found if "sandbox environment" in text]


async def finished(run: Run, status: str) -> tuple[Json, list[Json]]:
    body = await run.status("completed", "failed", "cancelled")
    assert body["status"] == status, body["error_message"]
    return body, await run.log()


async def test_variables_reach_the_agent(live: Yard) -> None:
    sent = {"GREETING": "from-the-environment", "PATH": "/nowhere", "LD_PRELOAD": "x.so", "HTTP_PROXY": "x:1"}
    wanted = await environment(live, environment_variables=sent)
    _, log = await finished(
        await live.api().start(SCRIPT, sandbox_environment_id=wanted, **SCRIPTED), "completed"
    )
    shown = json.dumps(log)
    assert "GREETING=from-the-environment" in shown
    for name in ("PATH", "LD_PRELOAD", "HTTP_PROXY"):
        assert f"{name}={sent[name]}" not in shown
    [note] = notes(log)
    assert note == ("The sandbox environment 'Build' gives network access 'full'.")


async def test_no_environment_no_variables(live: Yard) -> None:
    await environment(live, environment_variables={"GREETING": "from-the-environment"})
    _, log = await finished(await live.api().start(SCRIPT, **SCRIPTED), "completed")
    assert "from-the-environment" not in json.dumps(log)
    assert notes(log) == []


async def test_levels_are_named(live: Yard) -> None:
    wanted = await environment(
        live, network_access_level="custom", allowed_domains=["a.example.org", "*.example.org", "not a host"]
    )
    run = await live.api().start("SAY hi", sandbox_environment_id=wanted, **SCRIPTED)
    _, log = await finished(run, "completed")
    assert notes(log) == [
        (
            "The sandbox environment 'Build' gives network access 'custom' to 2 hosts. "
            "Ignored, because they are no host names: not a host."
        )
    ]


@pytest.mark.parametrize("how", ["deleted", "of somebody else", "no key"])
async def test_environment_that_cannot_be_used_any_more(live: Yard, how: str) -> None:
    """It is looked up again when the run begins: what the run was made with may have gone since."""
    wanted = await environment(
        live, environment_variables={"TOKEN": "secret-secret"}, private=how != "deleted"
    )
    api = live.api("bob" if how == "of somebody else" else "ada")
    task = await api.create_task(title="A task", description=SCRIPT)
    # Made by hand: the request refuses it, and a worker would take it before this test can go on.
    async with live.database.transaction() as connection:
        row = await (
            await connection.execute(
                "INSERT INTO runs (task_id, project_id, status, environment, state, started_at) VALUES"
                " (%(task)s, %(project)s, 'queued', 'cloud', %(state)s::jsonb, clock_timestamp()) RETURNING id",
                {
                    "task": task["id"],
                    "project": live.project,
                    "state": json.dumps({"agent": "scripted", "sandbox_environment_id": wanted}),
                },
            )
        ).fetchone()
        assert row is not None
        await connection.execute("INSERT INTO run_cursors (run_id) VALUES (%(id)s)", row)
        if how == "deleted":
            await connection.execute("DELETE FROM sandbox_environments")
        if how == "no key":
            (live.settings.data_dir / "secret-key").unlink()
        await enqueue_drive(connection, row["id"])
    body, log = await finished(Run(live.api(), task["id"], str(row["id"])), "failed")
    assert body["state"]["error_type"] == "environment_failed"
    expected = "TASKYARD_SECRET_KEYS" if how == "no key" else f"{wanted} does not exist, or is private"
    assert expected in body["error_message"]
    assert "secret-secret" not in json.dumps(log)


async def test_set_up_script(live: Yard) -> None:
    script = "echo begun in $(pwd)\necho $API_TOKEN; echo $GREETING >&2\necho ready > made.txt\n"
    script += "[[ -n $BASH ]] && echo bash"
    wanted = await environment(
        live, setup_script=script, environment_variables={"API_TOKEN": "tok-1234", "GREETING": "good morning"}
    )
    _, log = await finished(
        await live.api().start("SHELL cat made.txt", sandbox_environment_id=wanted, **SCRIPTED), "completed"
    )
    steps = [(p["step"], p["status"]) for p in of_method(log, "_posthog/progress")]
    assert steps.index(("setup", "completed")) < steps.index(("agent", "in_progress"))
    texts = [entry["message"] for entry in of_method(log, "_posthog/console")]
    said = [text for text in texts if text in ("***", "good morning", "bash") or text.startswith("begun in ")]
    assert said == ["begun in /tmp/workspace", "***", "good morning", "bash"]
    assert "ready" in json.dumps(log)
    assert "tok-1234" not in json.dumps(log)


async def test_set_up_script_with_an_interpreter(live: Yard) -> None:
    wanted = await environment(live, setup_script="#!/usr/bin/env python3\nprint('sum', 6 * 7)\n")
    _, log = await finished(
        await live.api().start("SAY hi", sandbox_environment_id=wanted, **SCRIPTED), "completed"
    )
    assert "sum 42" in [entry["message"] for entry in of_method(log, "_posthog/console")]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo almost\nfalse\necho never", "ended with exit code 1.\nalmost"),
        ("echo slow; sleep 60", "took longer than 3 seconds.\nslow"),
        ("kill -9 $$", "was killed"),
    ],
    ids=["fails", "takes too long", "is killed"],
)
async def test_set_up_script_that_does_not_work(live: Yard, script: str, said: str) -> None:
    wanted = await environment(live, setup_script=script)
    run = await live.api().start("SAY hi", sandbox_environment_id=wanted, **SCRIPTED)
    body, log = await finished(run, "failed")
    assert body["state"]["error_type"] == ("agent_lost" if "kill" in script else "setup_failed")
    assert said in body["error_message"]
    assert ("setup", "failed") in [(p["step"], p["status"]) for p in of_method(log, "_posthog/progress")]
    assert of_method(log, "_posthog/run_started") == []


async def test_a_tool_server_without_its_variable(live: Yard) -> None:
    server = {"name": "shelf", "command": "shelf", "env": {"KEY": "${SHELF_KEY}"}}
    wanted = await environment(live, mcp_servers=[server])
    body, _ = await finished(
        await live.api().start("SAY hi", sandbox_environment_id=wanted, **SCRIPTED), "failed"
    )
    assert body["state"]["error_type"] == "environment_failed"
    assert "'shelf' refers to ${SHELF_KEY}" in body["error_message"]
