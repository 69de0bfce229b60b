"""`POST R/start/` and `POST R/resume_in_cloud/` without a worker (tasks-api §5.6, §5.7)."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from taskyard.runs import store
from tests.support.yard import Run, Yard, error, ok


async def jobs(yard: Yard, run: Run) -> int:
    row = await yard.database.fetch_one(
        "SELECT count(*) AS n FROM run_queue WHERE run_id = %(run)s",
        run=run.id,
    )
    assert row is not None
    return int(row["n"])


async def test_start(yard: Yard) -> None:
    run = await yard.api().create_run(environment="cloud")
    assert await jobs(yard, run) == 0
    task = ok(await run.api.post(run.path("start/"), {"pending_user_message": " hello "}))
    assert (task["id"], task["latest_run"]["id"]) == (run.task_id, run.id)
    assert task["latest_run"]["state"] == {"mode": "background", "pending_user_message": "hello"}
    assert task["latest_run"]["status"] == "queued"
    assert await jobs(yard, run) == 1


async def test_without_a_body_and_with_a_blank_message(yard: Yard) -> None:
    api = yard.api()
    for body in (None, {}, {"pending_user_message": "  ", "pending_user_artifact_ids": []}):
        run = await api.create_run(environment="cloud")
        task = ok(await api.post(run.path("start/"), body))
        assert task["latest_run"]["state"] == {"mode": "background"}


async def test_two_starts_make_one_job(yard: Yard) -> None:
    run = await yard.api().create_run(environment="cloud")
    answers = await asyncio.gather(*(run.api.post(run.path("start/")) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert await jobs(yard, run) == 1
    task = ok(await run.api.post(run.path("start/"), {"pending_user_message": "later"}))
    assert task["latest_run"]["state"]["pending_user_message"] == "later"
    assert await jobs(yard, run) == 1


async def test_what_cannot_be_started(yard: Yard) -> None:
    api = yard.api()
    local = await api.create_run()
    response = await api.post(local.path("start/"), {})
    assert (response.status_code, response.json()) == (
        400, {"error": "Only cloud runs can be started via this endpoint"},
    )  # fmt: skip
    run = await api.create_run(environment="cloud")
    for status in ("in_progress", "completed", "failed", "cancelled"):
        await run.patch(status=status)
        response = await api.post(run.path("start/"), {})
        text = f"Only queued or not_started cloud runs can be started (current status: {status})"
        assert (response.status_code, response.json()) == (400, {"error": text})
    await run.patch(status="not_started")
    response = await api.post(run.path("start/"), {"pending_user_artifact_ids": ["0" * 32, "1", "1"]})
    assert (response.status_code, response.json()) == (
        400,
        {
            "detail": "Some pending_user_artifact_ids are invalid for this run",
            "missing_artifact_ids": ["0" * 32, "1"],
        },
    )
    assert await jobs(yard, run) == 0
    ok(await api.post(run.path("start/"), {}))


async def test_validation_comes_before_the_look_up(yard: Yard) -> None:
    run = await yard.api().create_run()
    path = run.path("start/").replace(run.id, "00000000-0000-4000-8000-000000000000")
    error(await run.api.post(path, {"pending_user_message": None}), 400, "null", "pending_user_message")
    error(await run.api.post(path, {}), 404, "not_found")


@pytest.mark.parametrize("rest", ["start/", "resume_in_cloud/"])
async def test_other_keys(yard: Yard, rest: str) -> None:
    run = await yard.api().create_run(environment="cloud")
    error(await yard.api("eve", yard.other_project).post(run.path(rest)), 404, "not_found")
    error(await yard.api("task:read").post(run.path(rest)), 403, "permission_denied")
    error(await yard.api(None).post(run.path(rest)), 401, "not_authenticated")
    other = await yard.api().create_task()
    error(await yard.api().post(run.path(rest).replace(run.task_id, other["id"])), 404, "not_found")


async def test_resume_in_cloud(yard: Yard) -> None:
    run = await yard.api().create_run()
    await run.patch(
        status="failed",
        error_message="oops",
        state={
            "pending_user_message": "old",
            "pending_user_artifact_ids": ["a"],
            "pending_user_message_ts": "1",
            "k": 1,
        },
    )
    body = ok(await run.api.post(run.path("resume_in_cloud/")))
    assert (body["id"], body["environment"], body["status"]) == (run.id, "cloud", "queued")
    assert (body["completed_at"], body["error_message"]) == (None, None)
    assert body["state"] == {"mode": "interactive", "k": 1, "handoff_resumed": True}
    assert await jobs(yard, run) == 1
    response = await run.api.post(run.path("resume_in_cloud/"))
    assert (response.status_code, response.json()) == (400, {"error": "Run is already active in cloud"})
    await run.cancel()
    assert [event["status"] for _, event in await run.stream()] == ["queued", "failed", "queued", "cancelled"]


async def test_a_cloud_run_can_be_resumed_once_it_has_ended(yard: Yard) -> None:
    run = await yard.api().create_run(environment="cloud")
    for status, code in (("queued", 400), ("in_progress", 400), ("completed", 200), ("not_started", 200)):
        await run.patch(status=status)
        assert (await run.api.post(run.path("resume_in_cloud/"))).status_code == code


async def test_a_worker_that_still_has_the_run_loses_it(yard: Yard) -> None:
    run = await yard.api().start()
    database, run_id = yard.database, UUID(run.id)
    claimed = await store.claim(database, run_id, "old")
    assert claimed is not None
    old = claimed.lease
    assert old.attempt == 1
    seen = await store.watch(database, old)
    assert (seen.held, seen.wanted) == (True, True)
    await run.cancel()
    assert not (await store.watch(database, old)).wanted
    ok(await run.api.post(run.path("resume_in_cloud/")))
    seen = await store.watch(database, old)
    assert (seen.held, seen.wanted) == (False, True)
    assert not await store.renew(database, old)
    # The next one waits until the old one has cleaned up, and is the first of the new start.
    assert await store.claim(database, run_id, "new") is None
    await store.release(database, old)
    claimed = await store.claim(database, run_id, "new")
    assert claimed is not None
    new = claimed.lease
    assert (new.attempt, new.generation > old.generation) == (1, True)
    await store.release(database, old)
    assert (await store.watch(database, new)).held
    assert await store.claim(database, run_id, "third") is None


async def test_going_local_ends_the_driving_and_nothing_else(yard: Yard) -> None:
    run = await yard.api().start()
    claimed = await store.claim(yard.database, UUID(run.id), "worker")
    assert claimed is not None
    lease = claimed.lease
    body = await run.patch(environment="local")
    assert (body["environment"], body["status"], body["completed_at"]) == ("local", "queued", None)
    assert not (await store.watch(yard.database, lease)).wanted
    response = await run.api.post(
        run.path("command/"), {"jsonrpc": "2.0", "method": "user_message", "params": {"content": "x"}}
    )
    assert (response.status_code, response.json()) == (400, {"error": "No active sandbox for this task run"})
    assert (await run.patch(environment="local", status="completed"))["status"] == "completed"
