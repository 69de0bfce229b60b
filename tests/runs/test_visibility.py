"""Runs of tasks that only their creators see (tasks-api §4.1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskyard.settings import Settings, TaskSettings
from tests.conftest import make_settings
from tests.support.yard import Yard, error, ok


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return make_settings(tmp_path, database_url, tasks=TaskSettings(visibility="creator"))


async def test_of_others(yard: Yard) -> None:
    run = await yard.api().create_run(environment="cloud")
    bob = yard.api("bob")
    command = {"jsonrpc": "2.0", "method": "cancel"}
    inline = {"artifacts": [{"name": "n", "type": "plan", "content": "x"}]}
    entry = ok(await run.api.post(run.path("artifacts/"), inline))["artifacts"][0]
    path = {"storage_path": entry["storage_path"]}
    upload = {**path, "id": entry["id"], "name": "n", "type": "plan"}
    for method, rest, body in (
        ("GET", "", None), ("PATCH", "", {}), ("PATCH", "set_output/", {"output": 1}), ("POST", "start/", {}),
        ("POST", "resume_in_cloud/", None), ("POST", "append_log/", {"entries": [{}]}), ("GET", "logs/", None),
        ("GET", "session_logs/", None), ("GET", "stream/", None), ("GET", "connection_token/", None),
        ("POST", "relay_message/", {"text": "x"}), ("POST", "command/", command),
        ("POST", "artifacts/", {"artifacts": [{"name": "n", "type": "plan", "content": ""}]}),
        ("POST", "artifacts/prepare_upload/", {"artifacts": [{"name": "n", "type": "plan", "size": 1}]}),
        ("POST", "artifacts/finalize_upload/", {"artifacts": [upload]}),
        ("POST", "artifacts/presign/", path), ("POST", "artifacts/download/", path),
    ):  # fmt: skip
        error(await bob.request(method, run.path(rest), json=body), 404, "not_found")
    for rest in ("runs/", "run/"):
        error(await bob.post(f"tasks/{run.task_id}/{rest}", {}), 404, "not_found")
    error(await bob.get(f"tasks/{run.task_id}/runs/"), 404, "not_found")
    assert (await run.fetch())["status"] == "queued"
    assert ok(await yard.api().get(f"tasks/{run.task_id}/runs/"))["count"] == 1


async def test_of_team_wide_tasks(yard: Yard) -> None:
    task = await yard.api().create_task(title="t", origin_product="signal_report")
    run = await yard.api().create_run(task)
    bob = yard.api("bob")
    assert ok(await bob.get(run.path()))["id"] == run.id
    assert ok(await bob.patch(run.path(), {"stage": "s"}))["stage"] == "s"
    inline = {"artifacts": [{"name": "n", "type": "plan", "content": "x"}]}
    entry = ok(await bob.post(run.path("artifacts/"), inline))["artifacts"][0]
    response = await bob.post(run.path("artifacts/download/"), {"storage_path": entry["storage_path"]})
    assert response.content == b"x"


async def test_automations_of_others(yard: Yard) -> None:
    """An automation shows what its task says, and starts its runs: who may not see the task sees none of it."""
    body = {"name": "n", "prompt": "secret", "repository": "acme/demo", "cron_expression": "0 3 1 1 *"}
    ada, bob = yard.api(), yard.api("bob")
    made = ok(await ada.post("task_automations/", body), 201)
    path = f"task_automations/{made['id']}/"
    assert ok(await bob.get("task_automations/")) == {
        "count": 0, "next": None, "previous": None, "results": [],
    }  # fmt: skip
    for method, where, sent in (
        ("GET", path, None), ("PATCH", path, {"enabled": False}), ("PUT", path, body), ("DELETE", path, None),
        ("POST", path + "run/", None),
    ):  # fmt: skip
        error(await bob.request(method, where, json=sent), 404, "not_found")
    assert ok(await ada.get(path)) == made
    assert ok(await ada.get("task_automations/"))["results"] == [made]
    ok(await ada.post(path + "run/"))
    assert (await ada.request("DELETE", path)).status_code == 204
    assert ok(await ada.get("task_automations/"))["count"] == 0
