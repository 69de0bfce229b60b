"""What of an environment reaches an agent: a whole server, a real sandbox, the scripted agent."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from taskyard.db.engine import Database
from taskyard.drive import layers
from taskyard.jobs import enqueue_drive
from taskyard.settings import RunSettings, Settings
from tests.conftest import make_settings
from tests.support.repositories import commit_file, make_repository
from tests.support.yard import Json, Run, Yard, of_method, ok, open_yard, updates

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


async def test_an_image_where_there_are_none(live: Yard) -> None:
    wanted = await environment(live, image="python:3.13")
    run = await live.api().start("SAY hi", sandbox_environment_id=wanted, **SCRIPTED)
    body, _ = await finished(run, "failed")
    assert body["state"]["error_type"] == "sandbox_failed"
    assert "'bubblewrap' makes sandboxes of the host's programs, not of images" in body["error_message"]


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


AGAIN = "its result is used again"


async def test_a_set_up_script_runs_once(live: Yard, tmp_path: Path) -> None:
    """For the same commit of the same repository and an unchanged environment; what it made is there all the same."""
    shop = make_repository(tmp_path / "shop")
    name = ok(await live.api().post("repositories/", {"origin": str(shop)}), 201)["name"]
    made = "mkdir -p ~/tools && head -c 8 /dev/urandom | base64 > ~/tools/made && chmod 600 ~/tools/made; echo $WHO"
    wanted = await environment(live, setup_script=made, environment_variables={"WHO": "first-time"})

    async def run() -> tuple[str, bool]:
        """What the script made, and whether it was used again."""
        started = await live.api().start(
            "SHELL cat ~/tools/made", repository=name, sandbox_environment_id=wanted, **SCRIPTED
        )
        _, log = await finished(started, "completed")
        [shown] = {
            part["content"]["text"].strip()
            for update in updates(log, "tool_call_update")
            for part in update.get("content", [])
            if part.get("content", {}).get("text", "").strip()
        }
        return shown, AGAIN in json.dumps(log)

    first = await run()
    assert first[1] is False
    assert await run() == (first[0], True)
    commit_file(shop, "b.txt", "two")
    second = await run()
    assert second[1] is False
    assert second[0] != first[0]
    assert await run() == (second[0], True)
    ok(await live.api().patch(f"sandbox_environments/{wanted}/", {"environment_variables": {"WHO": "other"}}))
    third = await run()
    assert third[1] is False
    assert third[0] not in (first[0], second[0])


async def test_a_set_up_script_that_changes_the_workspace_runs_each_time(live: Yard) -> None:
    wanted = await environment(live, setup_script="echo once >> made.txt; echo tool > ~/tool")
    for _ in range(2):
        run = await live.api().start("SHELL cat made.txt ~/tool", sandbox_environment_id=wanted, **SCRIPTED)
        _, log = await finished(run, "completed")
        assert "once\\ntool" in json.dumps(log)
        assert AGAIN not in json.dumps(log)
    assert not (live.settings.data_dir / layers.FOLDER).exists()


async def test_what_an_agent_changed_is_in_no_layer(live: Yard, tmp_path: Path) -> None:
    """A resumed run has the commit of a clean one; its script runs what the agent before it wrote."""
    shop = make_repository(tmp_path / "shop")
    commit_file(shop, "setup.sh", "echo clean > ~/made\n")
    name = ok(await live.api().post("repositories/", {"origin": str(shop)}), 201)["name"]
    wanted = await environment(live, setup_script="sh ./setup.sh", private=False)
    options = {"sandbox_environment_id": wanted, **SCRIPTED}
    first = await live.api().start(
        "SHELL echo 'echo planted > ~/made' > setup.sh", repository=name, **options
    )
    await finished(first, "completed")
    # So the layer of the first run does not fit any more.
    ok(await live.api().patch(f"sandbox_environments/{wanted}/", {"environment_variables": {"WHO": "other"}}))
    show = "SHELL cat ~/made; echo that is it"
    body = {"resume_from_run_id": first.id, "pending_user_message": show, **options}
    task = ok(await live.api().post(f"tasks/{first.task_id}/run/", body))
    _, log = await finished(Run(live.api(), first.task_id, task["latest_run"]["id"]), "completed")
    assert "planted\\nthat is it" in json.dumps(log), "a resumed run goes on in the workspace as it was left"
    other = await live.api("bob").start(show, repository=name, **options)
    _, log = await finished(other, "completed")
    assert AGAIN not in json.dumps(log)
    assert "clean\\nthat is it" in json.dumps(log)


async def test_a_layer_that_is_damaged_or_too_old_is_not_used(live: Yard) -> None:
    wanted = await environment(live, setup_script="echo tool > ~/tool")
    folder = live.settings.data_dir / layers.FOLDER

    async def run() -> bool:
        started = await live.api().start("SHELL cat ~/tool", sandbox_environment_id=wanted, **SCRIPTED)
        _, log = await finished(started, "completed")
        assert '"tool' in json.dumps(updates(log, "tool_call_update"))
        return AGAIN in json.dumps(log)

    assert [await run(), await run()] == [False, True]
    [layer] = folder.iterdir()
    layer.write_bytes(b"no archive")
    assert [await run(), await run()] == [False, True]
    os.utime(layer, (time.time() - 7200, time.time() - 7200))
    assert await run() is False
    os.utime(layer, (time.time() - 7200, time.time() - 7200))
    (folder / "x.part").write_bytes(b"")
    os.utime(folder / "x.part", (0, 0))
    layers.tidy(live.settings.data_dir, 3600)
    assert list(folder.iterdir()) == []


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
