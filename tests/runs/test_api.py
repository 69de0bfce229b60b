"""Run endpoints over HTTP, without a worker (tasks-api §3, §4.8, §5)."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from tests.support.yard import Yard, error, ok

CLAUDE = {"runtime_adapter": "claude", "model": "claude-sonnet-4-6"}


async def test_run_answers_with_the_task(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    response = await api.post(
        f"tasks/{task['id']}/run/", headers={"Content-Type": "application/json"}, content=b""
    )
    run = ok(response)["latest_run"]
    assert (run["task"], run["status"], run["environment"], run["state"]) == (
        task["id"], "queued", "cloud", {"mode": "background"},
    )  # fmt: skip
    assert (run["branch"], run["output"], run["error_message"], run["completed_at"], run["artifacts"]) == (
        None, None, None, None, [],
    )  # fmt: skip
    read = ok(await api.get(f"tasks/{task['id']}/runs/{run['id']}/"))
    assert read["state"].pop("queue")["position"] == 1
    assert read == run
    assert ok(await api.get(f"tasks/{task['id']}/"))["latest_run"] == run


async def test_fields_go_to_the_state(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    sent = {
        **CLAUDE, "reasoning_effort": "high", "mode": "interactive", "branch": "main", "run_source": "manual",
        "pr_authorship_mode": "bot", "initial_permission_mode": "plan", "pending_user_message": " hello ",
    }  # fmt: skip
    run = ok(await api.post(f"tasks/{task['id']}/run/", sent))["latest_run"]
    kept = {key: sent[key] for key in sent if key not in ("branch", "pending_user_message")}
    assert run["state"] == kept | {
        "provider": "anthropic",
        "pr_base_branch": "main",
        "pending_user_message": "hello",
    }
    assert (run["branch"], run["runtime_adapter"], run["provider"], run["model"], run["reasoning_effort"]) == (
        "main", "claude", "anthropic", "claude-sonnet-4-6", "high",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "code", "attr"),
    [
        ({"mode": "sideways"}, "invalid_choice", "mode"),
        ({"mode": None}, "null", "mode"),
        ({"branch": ""}, "blank", "branch"),
        ({"branch": "b" * 256}, "max_length", "branch"),
        ({"resume_from_run_id": "x"}, "invalid_input", "resume_from_run_id"),
        ({"pending_user_artifact_ids": "x"}, "not_a_list", "pending_user_artifact_ids"),
        ({"model": "m"}, "invalid_input", "runtime_adapter"),
        ({"runtime_adapter": "claude"}, "invalid_input", "model"),
        ({"runtime_adapter": None}, "null", "runtime_adapter"),
        ({**CLAUDE, "reasoning_effort": "max"}, "invalid_input", "reasoning_effort"),
        ({"initial_permission_mode": "plan"}, "invalid_input", "initial_permission_mode"),
        ({**CLAUDE, "initial_permission_mode": "full-access"}, "invalid_input", "initial_permission_mode"),
        ({"initial_permission_mode": "yolo"}, "invalid_choice", "initial_permission_mode"),
        ({"agent": "nobody"}, "invalid_input", "agent"),
    ],
)
async def test_bad_fields(yard: Yard, body: dict[str, object], code: str, attr: str) -> None:
    api = yard.api()
    task = await api.create_task()
    error(await api.post(f"tasks/{task['id']}/run/", body), 400, code, attr)
    assert ok(await api.get(f"tasks/{task['id']}/runs/"))["count"] == 0


async def test_effort_refusal_names_what_is_allowed(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    body = {"runtime_adapter": "codex", "model": "gpt-5.4", "reasoning_effort": "max"}
    refused = error(
        await api.post(f"tasks/{task['id']}/run/", body), 400, "invalid_input", "reasoning_effort"
    )
    assert refused["detail"] == (
        "Reasoning effort 'max' is not supported for runtime_adapter 'codex' and model 'gpt-5.4'. "
        "Supported values: low, medium, high."
    )


async def test_hand_built_refusals(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    for body, answer in (
        ({"resume_from_run_id": str(uuid.uuid4())}, {"detail": "Invalid resume_from_run_id"}),
        ({"sandbox_environment_id": str(uuid.uuid4())}, {"detail": "Invalid sandbox_environment_id"}),
        (
            {"pending_user_artifact_ids": ["a"]},
            {
                "detail": "Some pending_user_artifact_ids are invalid or expired",
                "missing_artifact_ids": ["a"],
            },
        ),
    ):
        response = await api.post(f"tasks/{task['id']}/run/", body)
        assert (response.status_code, response.json()) == (400, answer)
    assert ok(await api.get(f"tasks/{task['id']}/runs/"))["count"] == 0


async def test_validation_comes_before_the_look_up(yard: Yard) -> None:
    path = f"tasks/{uuid.uuid4()}/run/"
    error(await yard.api().post(path, {"mode": "sideways"}), 400, "invalid_choice", "mode")
    error(await yard.api().post(path, {"model": "m"}), 400, "invalid_input", "runtime_adapter")
    error(await yard.api().post(path, {}), 404, "not_found")


async def test_list(yard: Yard) -> None:
    api = yard.api()
    run = await api.start()
    other = await api.start()
    second = ok(await api.post(f"tasks/{run.task_id}/run/"))["latest_run"]["id"]
    page = ok(await api.get(f"tasks/{run.task_id}/runs/"))
    assert (page["count"], [item["id"] for item in page["results"]]) == (2, [second, run.id])
    error(await api.get(f"tasks/{uuid.uuid4()}/runs/"), 404, "not_found")
    error(await api.get(f"tasks/{other.task_id}/runs/{run.id}/"), 404, "not_found")
    error(await yard.api("eve", yard.other_project).get(run.path()), 404, "not_found")


async def test_cancel(yard: Yard) -> None:
    api = yard.api()
    run = await api.start()
    before = await run.fetch()
    body = await run.cancel()
    assert (body["status"], body["error_message"]) == ("cancelled", None)
    assert body["completed_at"] is not None
    assert body["updated_at"] > before["updated_at"]
    again = await run.cancel()
    assert again["completed_at"] == body["completed_at"]
    assert again["updated_at"] > body["updated_at"]
    states = [event["status"] for _, event in await run.stream()]
    assert states == ["queued", "cancelled", "cancelled"]


async def test_no_guard_between_statuses(yard: Yard) -> None:
    api = yard.api()
    run = await api.start()
    await run.cancel()
    body = ok(await api.patch(run.path(), {"status": "in_progress"}))
    assert (body["status"], body["completed_at"] is None) == ("in_progress", False)


async def test_bad_patch(yard: Yard) -> None:
    api = yard.api()
    run = await api.start()
    error(await api.patch(run.path(), {"status": "lost"}), 400, "invalid_choice", "status")
    error(await api.patch(run.path(), {"status": None}), 400, "null", "status")
    error(
        await api.patch(f"tasks/{run.task_id}/runs/{uuid.uuid4()}/", {"status": "failed"}), 404, "not_found"
    )
    for method in ("PUT", "DELETE"):
        error(await api.request(method, run.path(), json={}), 405, "method_not_allowed")


async def test_patches_at_the_same_time(yard: Yard) -> None:
    api = yard.api()
    run = await api.start()
    bodies = [{"status": "in_progress"} if n % 2 else {"error_message": str(n)} for n in range(50)]
    answers = await asyncio.gather(*(api.patch(run.path(), body) for body in bodies))
    stamps = [ok(answer)["updated_at"] for answer in answers]
    assert len(set(stamps)) == 50
    assert (await run.fetch())["status"] == "in_progress"
    await run.cancel()
    events = await run.stream()
    assert [event["updated_at"] for _, event in events] == sorted(event["updated_at"] for _, event in events)
    assert len(events) == 52


async def test_stream_needs_no_slash_and_says_no_cache(yard: Yard) -> None:
    api = yard.api()
    run = await api.start()
    await run.cancel()
    response = await api.get(run.path("stream/").rstrip("/"), headers={"Accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert await run.stream(start="latest") == []
    first = (await run.stream())[0][0]
    assert [event["status"] for _, event in await run.stream(last_event_id=first, start="latest")] == [
        "cancelled"
    ]
    error(await api.get(f"tasks/{run.task_id}/runs/{uuid.uuid4()}/stream/"), 404, "not_found")


async def test_log_url_needs_no_credentials(yard: Yard) -> None:
    run = await yard.api().start()
    url = (await run.fetch())["log_url"]
    assert url == (await run.fetch())["log_url"]
    error(await yard.client.get(url), 404, "not_found")
    await yard.database.execute(
        "WITH c AS (UPDATE run_cursors SET last_seq = last_seq + 1 WHERE run_id = %(run)s RETURNING last_seq)"
        " INSERT INTO events SELECT %(run)s, last_seq, 0, 3, '{\"a\": 1}' FROM c",
        run=run.id,
    )
    response = await yard.client.get(url)
    assert (response.status_code, response.text) == (200, '{"a": 1}')
    for broken in (
        url[:-1],
        url.replace("expires=", "expires=1"),
        url.split("?")[0],
        url.replace(run.id, str(uuid.uuid4())),
    ):
        error(await yard.client.get(broken), 404, "not_found")


async def test_logs_of_a_silent_run_are_empty(yard: Yard) -> None:
    run = await yard.api().start()
    response = await yard.api().get(run.path("logs"))
    assert (response.status_code, response.text) == (200, "")
    assert response.headers["content-type"].startswith("application/jsonl")
