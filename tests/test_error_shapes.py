"""Every shape that a refusal has, to the letter: the envelope, and the bodies that the contract builds by hand.

Clients read `detail`, then `error`, so which of the two there is counts (tasks-api §1.4, §4.8 to §7).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from taskyard.db.engine import Database
from taskyard.tasks import service as tasks
from tests.conftest import make_settings
from tests.support.artifacts import Staged, item, named, send
from tests.support.yard import Json, Run, Yard, ok, open_yard

NOBODY = "00000000-0000-4000-8000-000000000000"


def envelope(kind: str, code: str, detail: str, attr: str | None = None) -> Json:
    return {"type": kind, "code": code, "detail": detail, "attr": attr}


def check(response: httpx.Response, status: int, body: Json) -> None:
    assert (response.status_code, response.json()) == (status, body), response.request.url


INVALID, REQUEST, AUTH = "validation_error", "invalid_request", "authentication_error"
NOT_FOUND = envelope(REQUEST, "not_found", "Not found.")


async def test_who_asks_and_where(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    one, run = f"tasks/{task['id']}/", (await api.create_run(task)).path()
    check(
        await yard.api(None).get("tasks/"),
        401,
        envelope(AUTH, "not_authenticated", "Authentication credentials were not provided."),
    )
    check(
        await api.get("tasks/", headers={"Authorization": "Bearer phx_no"}),
        401,
        envelope(AUTH, "authentication_failed", "Invalid API key: unknown, expired or revoked."),
    )
    check(
        await yard.api("eve").get("tasks/"),
        403,
        envelope(AUTH, "permission_denied", "You don't have access to the project."),
    )
    check(
        await yard.api("task:read").post("tasks/", {}),
        403,
        envelope(AUTH, "permission_denied", "API key missing required scope 'task:write'"),
    )
    for path in ("/api/projects/987654321/tasks/", "/api/projects/x/tasks/"):
        check(await api.get(path), 404, envelope(REQUEST, "not_found", "Project not found."))
    for path in (
        f"tasks/{NOBODY}/",
        "tasks/x/",
        f"{one}runs/{NOBODY}/",
        f"{one}runs/x/",
        "nothing/",
        "/api/x",
    ):
        check(await api.get(path), 404, NOT_FOUND)
    check(await api.post(f"tasks/{NOBODY}/runs/", {}), 404, envelope(REQUEST, "not_found", "Task not found"))
    for method, path in (("DELETE", run), ("PUT", run), ("PATCH", "tasks/"), ("DELETE", "tasks/")):
        refused = envelope(REQUEST, "method_not_allowed", f'Method "{method}" not allowed.')
        check(await api.request(method, path, json={}), 405, refused)


async def test_bodies(yard: Yard) -> None:
    api = yard.api()
    sent = await api.post("tasks/", content=b"{", headers={"Content-Type": "application/json"})
    body = sent.json()
    assert body.pop("detail").startswith("JSON parse error - ")
    assert (sent.status_code, body) == (400, {"type": INVALID, "code": "parse_error", "attr": None})
    check(
        await api.post("tasks/", content=b"x", headers={"Content-Type": "text/plain"}),
        415,
        envelope(REQUEST, "unsupported_media_type", 'Unsupported media type "text/plain" in request.'),
    )
    check(
        await api.post("tasks/", []),
        400,
        envelope(INVALID, "invalid_input", "Invalid data. Expected a dictionary, but got list."),
    )
    large = json.dumps({"description": "x" * 20_000_000}).encode()
    refused = await api.post("tasks/", content=large, headers={"Content-Type": "application/json"})
    assert (refused.status_code, set(refused.json())) == (413, {"type", "code", "detail", "attr"})
    assert refused.json()["detail"].startswith("The request is larger than 10 MB. Send less at once")


async def test_no_depth_of_nesting_is_an_error_of_the_server(yard: Yard) -> None:
    """What parses JSON can follow some more levels than what comes behind it, or fewer."""
    api, answers = yard.api(), set()
    for depth in (100, *range(900, 1000), 5000):
        raw = '{"title": "x", "json_schema": ' + '{"a":' * depth + '"\\u0000"' + "}" * depth + "}"
        sent = await api.post("tasks/", content=raw, headers={"Content-Type": "application/json"})
        answers.add((sent.status_code, sent.json()["code"]))
    assert answers == {(400, "null_characters_not_allowed"), (400, "parse_error")}


FIELDS: list[tuple[str, Json, str, str | None, str]] = [
    ("tasks/", {"title": "x" * 256}, "max_length", "title", "Ensure this field has no more than 255 characters."),
    ("tasks/", {"title": None}, "null", "title", "This field may not be null."),
    ("tasks/", {"internal": "perhaps"}, "invalid_input", "internal", "Must be a valid boolean."),
    ("tasks/", {"origin_product": "moon"}, "invalid_choice", "origin_product", '"moon" is not a valid choice.'),
    ("tasks/", {"repository": "shop"}, "invalid_input", "repository",
     "Repository must be in the format organization/repository"),
    ("tasks/", {"github_integration": 7}, "does_not_exist", "github_integration",
     'Invalid pk "7" - object does not exist.'),
    ("tasks/", {"github_integration": "x"}, "invalid_input", "github_integration", "A valid integer is required."),
    ("tasks/", {"signal_report": "x"}, "invalid_input", "signal_report", "Must be a valid UUID."),
    ("tasks/", {"signal_report_task_relationship": "implementation"}, "invalid_input",
     "signal_report_task_relationship", "Requires signal_report when set."),
    ("tasks/summaries/", {}, "required", "ids", "This field is required."),
    ("tasks/summaries/", {"ids": []}, "empty", "ids", "This list may not be empty."),
    ("tasks/summaries/", {"ids": "x"}, "not_a_list", "ids", 'Expected a list of items but got type "str".'),
    ("tasks/summaries/", {"ids": ["x"]}, "invalid_input", "ids__0", "Must be a valid UUID."),
    ("TASK/run/", {"branch": ""}, "blank", "branch", "This field may not be blank."),
    ("TASK/run/", {"model": "m"}, "invalid_input", "runtime_adapter",
     "This field is required when selecting a cloud runtime."),
    ("TASK/staged_artifacts/prepare_upload/", {"artifacts": []}, "invalid_input", "artifacts",
     "At least one artifact is required"),
    ("TASK/staged_artifacts/prepare_upload/", {"artifacts": [{**item(), "size": 0}]}, "min_value",
     "artifacts__0__size", "Ensure this value is greater than or equal to 1."),
    ("TASK/staged_artifacts/prepare_upload/", {"artifacts": [item(), item(size=31457281)]}, "invalid_input",
     "artifacts__1__size", "notes.txt exceeds the 30MB attachment limit"),
    ("TASK/staged_artifacts/prepare_upload/", {"artifacts": [item("a.pdf", size=10485761)]}, "invalid_input",
     "artifacts__0__size", "a.pdf exceeds the 10MB attachment limit for PDFs in cloud runs"),
    ("RUN/artifacts/", {"artifacts": [{"name": "a", "type": "output", "content": "?", "content_encoding": "base64"}]},
     "invalid_input", "artifacts__0__content", "Invalid base64 content"),
    ("RUN/append_log/", {"entries": []}, "invalid_input", "entries", "At least one log entry is required"),
    ("RUN/relay_message/", {"text": " "}, "blank", "text", "This field may not be blank."),
    ("RUN/command/", {"jsonrpc": "2.0", "method": "cancel", "id": []}, "invalid_input", "id",
     "id must be a string or number"),
    ("RUN/command/", {"jsonrpc": "2.0", "method": "x"}, "invalid_choice", "method", '"x" is not a valid choice.'),
]  # fmt: skip


async def test_fields(yard: Yard) -> None:
    """The words of the contract, for a field of each kind."""
    run = await yard.api().create_run()
    wrong = []
    for path, sent, code, attr, detail in FIELDS:
        place = path.replace("TASK", f"tasks/{run.task_id}").replace("RUN/", run.path())
        response = await run.api.post(place, sent)
        got = response.status_code, response.json()
        if got != (400, envelope(INVALID, code, detail, attr)):
            wrong.append((path, sent, got))
    assert wrong == []


async def test_runs(yard: Yard) -> None:
    api = yard.api()
    run = await api.start()
    local = await api.create_run({"id": run.task_id})
    start = f"tasks/{run.task_id}/run/"

    async def refused(path: str, sent: Json | None, body: Json, method: str = "POST") -> None:
        check(await api.request(method, path, **({} if sent is None else {"json": sent})), 400, body)

    await refused(start, {"resume_from_run_id": NOBODY}, {"detail": "Invalid resume_from_run_id"})
    await refused(start, {"sandbox_environment_id": NOBODY}, {"detail": "Invalid sandbox_environment_id"})
    await refused(
        start,
        {"pending_user_artifact_ids": ["a", "b"]},
        {
            "detail": "Some pending_user_artifact_ids are invalid or expired",
            "missing_artifact_ids": ["a", "b"],
        },
    )
    await refused(local.path("start/"), {}, {"error": "Only cloud runs can be started via this endpoint"})
    await refused(
        run.path("start/"),
        {"pending_user_artifact_ids": ["a"]},
        {"detail": "Some pending_user_artifact_ids are invalid for this run", "missing_artifact_ids": ["a"]},
    )
    await refused(run.path("resume_in_cloud/"), None, {"error": "Run is already active in cloud"})
    command: Json = {"jsonrpc": "2.0", "method": "user_message", "params": {"artifact_ids": ["a"]}}
    await refused(
        run.path("command/"),
        command,
        {"error": "Some artifact_ids are invalid for this run", "missing_artifact_ids": ["a"]},
    )
    await refused(
        local.path("command/"),
        {"jsonrpc": "2.0", "method": "cancel"},
        {"error": "No active sandbox for this task run"},
    )
    await run.cancel()
    await refused(
        run.path("start/"),
        {},
        {"error": "Only queued or not_started cloud runs can be started (current status: cancelled)"},
    )
    schema = await api.create_run(await api.create_task(json_schema={"required": ["n"]}))
    await refused(
        schema.path("set_output/"),
        {"output": {}},
        {"error": "Output validation error: 'n' is a required property"},
        "PATCH",
    )
    await api.patch(f"tasks/{run.task_id}/", {"repository": "acme/shop"})
    response = await api.post(start, {"pr_authorship_mode": "user"})
    body = response.json()
    assert body.pop("detail")
    assert (response.status_code, body) == (
        400,
        {"type": INVALID, "code": "github_authorization_required", "attr": "pr_authorship_mode"},
    )


async def test_artifacts(yard: Yard) -> None:
    run = await yard.api().create_run()
    place = Staged(run.api, run.task_id)
    [staged] = await place.prepare(item())
    [of_run] = ok(await run.api.post(run.path("artifacts/prepare_upload/"), {"artifacts": [item()]}))[
        "artifacts"
    ]

    async def refused(entry: Json, text: str, *, of: str) -> None:
        path = run.path("artifacts/") if of == "run" else f"tasks/{run.task_id}/staged_artifacts/"
        check(
            await run.api.post(path + "finalize_upload/", {"artifacts": [named(entry)]}), 400, {"error": text}
        )

    await refused(of_run, "Artifact storage path is invalid for this task", of="task")
    await refused(staged, "Artifact storage path is invalid for this run", of="run")
    for entry, of in ((staged, "task"), (of_run, "run")):
        await refused(entry, "Artifact upload not found in object storage", of=of)
    [form] = await place.prepare(item("a.txt", size=10_485_761))
    await send(run.api, form, b"x" * 10_485_761)
    pdf = {**form, "name": "a.pdf"}
    await refused(pdf, "a.pdf exceeds the 10MB attachment limit for PDFs in cloud runs", of="task")
    for action in ("presign", "download"):
        response = await run.api.post(run.path(f"artifacts/{action}/"), {"storage_path": "none"})
        check(response, 404, {"error": "Artifact not found on this run"})


async def test_events_of_an_agent(yard: Yard) -> None:
    run = await yard.api().create_run()
    token = ok(
        await run.api.get(run.path("connection_token/"), params={"audience": "posthog:sandbox_event_ingest"})
    )["token"]

    async def sent(line: Any, run: Run = run, key: str = token) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return await run.api.client.post(
            f"/api/projects/@current/{run.path('event_stream/')}", content=json.dumps(line), headers=headers
        )

    for line, status in (({"seq": 5, "event": {}}, 409), ({"seq": 0, "event": {}}, 400)):
        response = await sent(line)
        body = response.json()
        assert body.pop("error")
        assert (response.status_code, body) == (status, {"last_accepted_seq": 0})
    assert (await sent({}, key="x")).json().keys() == {"type", "code", "detail", "attr"}
    other = await sent({"seq": 1, "event": {}}, await yard.api().create_run())
    check(other, 403, envelope(AUTH, "permission_denied", "The token is for another run."))


@pytest.fixture
async def hurried(tmp_path: Path, database_url: str, database: Database) -> AsyncIterator[Yard]:
    settings = make_settings(tmp_path, database_url, rate_limits={"per_minute": 1})
    async with open_yard(settings, database) as yard:
        yield yard


async def test_too_many_requests(hurried: Yard) -> None:
    ok(await hurried.api().get("tasks/"))
    response = await hurried.api().get("tasks/")
    wait = response.headers["retry-after"]
    noun = "second" if wait == "1" else "seconds"
    detail = f"Request was throttled. Expected available in {wait} {noun}."
    check(response, 429, envelope("throttled_error", "throttled", detail))


async def test_a_bug_tells_nothing(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("the password is secret")

    monkeypatch.setattr(tasks, "find", broken)
    response = await yard.api().get(f"tasks/{uuid4()}/")
    check(response, 500, envelope("server_error", "error", "A server error occurred."))
