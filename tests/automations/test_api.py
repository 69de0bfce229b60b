"""Automation endpoints over HTTP (tasks-api §10)."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.yard import Api, Json, Yard, error, ok

KEYS = [
    "id", "name", "prompt", "repository", "github_integration", "cron_expression", "timezone", "template_id",
    "enabled", "last_run_at", "last_run_status", "last_task_id", "last_task_run_id", "last_error", "created_at",
    "updated_at",
]  # fmt: skip
BODY: Json = {
    "name": "Nightly", "prompt": "Do it", "repository": "acme/demo", "cron_expression": "0 3 1 1 *",
}  # fmt: skip
FIVE = (
    "Only standard 5-field cron expressions are supported (minute hour day month weekday). "
    "Example: '0 9 * * 1-5'."
)
INVALID = "Invalid cron expression. Use standard 5-field cron syntax (e.g., '0 9 * * 1-5')."


async def create(api: Api, **fields: Any) -> Json:
    return ok(await api.post("task_automations/", {**BODY, **fields}), 201)


async def next_run(yard: Yard, automation: Json) -> datetime | None:
    row = await yard.database.fetch_one(
        "SELECT next_run_at FROM task_automations WHERE id = %(id)s", id=automation["id"]
    )
    assert row is not None
    at: datetime | None = row["next_run_at"]
    return at


async def test_create_and_retrieve(yard: Yard) -> None:
    api = yard.api()
    made = await create(api, name=" Nightly ", repository="Acme/Demo", template_id="t1")
    assert list(made) == KEYS
    assert {key: made[key] for key in BODY} == BODY
    assert (made["timezone"], made["template_id"], made["enabled"]) == ("UTC", "t1", True)
    assert made["github_integration"] is None
    for key in ("last_run_at", "last_run_status", "last_task_run_id", "last_error"):
        assert made[key] is None
    assert ok(await api.get(f"task_automations/{made['id']}/")) == made
    task = ok(await api.get(f"tasks/{made['last_task_id']}/"))
    assert (task["title"], task["description"], task["title_manually_set"]) == ("Nightly", "Do it", True)
    assert (task["origin_product"], task["repository"]) == ("automation", "acme/demo")
    assert task["created_by"]["id"] == yard.users["ada"]
    at = await next_run(yard, made)
    assert at is not None
    assert at > datetime.now(UTC)
    assert (at.month, at.day, at.hour, at.minute) == (1, 1, 3, 0)


async def test_disabled_has_no_next_run(yard: Yard) -> None:
    assert await next_run(yard, await create(yard.api(), enabled=False)) is None


async def test_update(yard: Yard) -> None:
    api = yard.api()
    made = await create(api, template_id="t1")
    path = f"task_automations/{made['id']}/"
    at = await next_run(yard, made)
    named = ok(await api.patch(path, {"name": "Renamed", "prompt": "Other", "repository": "A/B"}))
    assert (named["name"], named["prompt"], named["repository"]) == ("Renamed", "Other", "a/b")
    assert named["template_id"] == "t1"
    assert named["updated_at"] > made["updated_at"]
    task = ok(await api.get(f"tasks/{made['last_task_id']}/"))
    assert (task["title"], task["description"], task["repository"]) == ("Renamed", "Other", "a/b")
    assert await next_run(yard, made) == at
    moved = ok(await api.patch(path, {"cron_expression": "30 12 * * *", "timezone": "Asia/Tokyo"}))
    assert (moved["cron_expression"], moved["timezone"]) == ("30 12 * * *", "Asia/Tokyo")
    at = await next_run(yard, made)
    assert at is not None
    assert (at.hour, at.minute) == (3, 30)
    assert ok(await api.patch(path, {"template_id": None}))["template_id"] is None
    assert ok(await api.patch(path, {"enabled": False}))["enabled"] is False
    assert await next_run(yard, made) is None
    ok(await api.patch(path, {"enabled": True}))
    assert await next_run(yard, made) == at
    # The name is the task's title, whoever changes it.
    ok(await api.patch(f"tasks/{made['last_task_id']}/", {"title": "By hand"}))
    assert ok(await api.get(path))["name"] == "By hand"


async def test_put_needs_the_required_fields(yard: Yard) -> None:
    api = yard.api()
    made = await create(api, timezone="Asia/Tokyo")
    path = f"task_automations/{made['id']}/"
    replaced = ok(await api.request("PUT", path, json={**BODY, "name": "Put"}))
    assert (replaced["name"], replaced["timezone"]) == ("Put", "Asia/Tokyo")
    error(await api.request("PUT", path, json={"name": "x"}), 400, "required", "prompt")


@pytest.mark.parametrize(
    ("field", "value", "code", "detail"),
    [
        ("name", None, "null", "This field may not be null."),
        ("name", "", "blank", "This field may not be blank."),
        ("name", "n" * 256, "max_length", "Ensure this field has no more than 255 characters."),
        ("prompt", " ", "blank", "This field may not be blank."),
        ("repository", "", "blank", "This field may not be blank."),
        ("repository", None, "null", "This field may not be null."),
        ("repository", "x", "invalid_input", "Repository must be in the format organization/repository"),
        ("repository", "a/b/c", "invalid_input", "Repository must be in the format organization/repository"),
        ("repository", "İ" * 200 + "/x", "max_length", "Ensure this field has no more than 255 characters."),
        ("github_integration", 7, "does_not_exist", 'Invalid pk "7" - object does not exist.'),
        ("cron_expression", "* * * *", "invalid_input", FIVE),
        ("cron_expression", "@daily", "invalid_input", FIVE),
        ("cron_expression", "0 0 9 * * 1", "invalid_input", FIVE),
        ("cron_expression", "61 * * * *", "invalid_input", INVALID),
        ("cron_expression", "0 0 30 2 *", "invalid_input", INVALID),
        ("cron_expression", "", "blank", "This field may not be blank."),
        ("cron_expression", "1," * 50 + "1 * * * *", "max_length",
         "Ensure this field has no more than 100 characters."),
        ("timezone", "Moon/Base", "invalid_input", "'Moon/Base' is not a valid IANA timezone."),
        ("timezone", "{x}", "invalid_input", "'{x}' is not a valid IANA timezone."),
        ("timezone", None, "null", "This field may not be null."),
        ("template_id", "t" * 256, "max_length", "Ensure this field has no more than 255 characters."),
        ("enabled", "perhaps", "invalid_input", "Must be a valid boolean."),
    ],
)  # fmt: skip
async def test_bad_fields(yard: Yard, field: str, value: Any, code: str, detail: str) -> None:
    api = yard.api()
    refused = error(await api.post("task_automations/", {**BODY, field: value}), 400, code, field)
    assert (refused["detail"], refused["type"]) == (detail, "validation_error")
    # Neither the automation nor the task is there.
    assert ok(await api.get("task_automations/"))["count"] == 0
    assert await yard.database.fetch("SELECT 1 FROM tasks") == []
    made = await create(api)
    # An integration is looked up, so the automation has to be there for that one.
    for one in (made["id"], uuid.uuid4()) if code != "does_not_exist" else (made["id"],):
        refused = error(await api.patch(f"task_automations/{one}/", {field: value}), 400, code, field)
        assert refused["detail"] == detail
    assert ok(await api.get(f"task_automations/{made['id']}/")) == made


@pytest.mark.parametrize("field", list(BODY))
async def test_required_fields(yard: Yard, field: str) -> None:
    body = {key: value for key, value in BODY.items() if key != field}
    error(await yard.api().post("task_automations/", body), 400, "required", field)


async def test_list_by_title(yard: Yard) -> None:
    api = yard.api()
    made = [await create(api, name=name) for name in ("b", "a", "c", "a")]
    body = ok(await api.get("task_automations/"))
    assert body["count"] == 4
    order = [made[3], made[1], made[0], made[2]]  # the newer of the same title first
    assert body["results"] == order
    first = ok(await api.get("task_automations/", params={"limit": 3}))
    assert ok(await api.get(first["next"]))["results"] == order[3:]


async def test_delete_keeps_the_task(yard: Yard) -> None:
    api = yard.api()
    made = await create(api)
    path = f"task_automations/{made['id']}/"
    started = ok(await api.post(path + "run/"))
    response = await api.request("DELETE", path)
    assert (response.status_code, response.content) == (204, b"")
    error(await api.get(path), 404, "not_found")
    error(await api.request("DELETE", path), 404, "not_found")
    error(await api.post(path + "run/"), 404, "not_found")
    task = ok(await api.get(f"tasks/{made['last_task_id']}/"))
    assert task["latest_run"]["id"] == started["last_task_run_id"]


async def test_run_now(yard: Yard) -> None:
    api = yard.api()
    made = await create(api, enabled=False)
    path = f"task_automations/{made['id']}/"
    started = ok(await api.post(path + "run/"))
    run_path = f"tasks/{made['last_task_id']}/runs/{started['last_task_run_id']}/"
    run = ok(await api.get(run_path))
    assert (run["status"], run["environment"]) == ("queued", "cloud")
    assert (run["state"]["automation_id"], run["state"]["mode"]) == (made["id"], "background")
    assert (started["last_run_status"], started["last_run_at"]) == ("running", run["created_at"])
    assert (started["last_error"], started["enabled"]) == (None, False)
    waiting = await yard.database.fetch("SELECT run_id::text FROM run_queue")
    assert waiting == [{"run_id": run["id"]}]
    # Each call is a run of its own.
    again = ok(await api.post(path + "run/", {}))
    assert again["last_task_run_id"] != started["last_task_run_id"]
    error(await api.post(path + "run/", [1]), 400, "invalid_input")


@pytest.mark.parametrize(
    ("status", "shown", "last_error"),
    [("completed", "success", None), ("failed", "failed", "It broke"), ("cancelled", "failed", None),
     ("in_progress", "running", None)],
)  # fmt: skip
async def test_last_run_is_read_from_the_run(
    yard: Yard, status: str, shown: str, last_error: str | None
) -> None:
    api = yard.api()
    made = await create(api)
    started = ok(await api.post(f"task_automations/{made['id']}/run/"))
    run_path = f"tasks/{made['last_task_id']}/runs/{started['last_task_run_id']}/"
    changes = {"status": status, "error_message": "It broke" if status == "failed" else None}
    ok(await api.patch(run_path, changes))
    now = ok(await api.get(f"task_automations/{made['id']}/"))
    assert (now["last_run_status"], now["last_error"]) == (shown, last_error)
    assert ok(await api.get("task_automations/"))["results"] == [now]


async def test_deleted_task(yard: Yard) -> None:
    api = yard.api()
    made = await create(api)
    await api.request("DELETE", f"tasks/{made['last_task_id']}/")
    error(await api.post(f"task_automations/{made['id']}/run/"), 404, "not_found")
    assert ok(await api.get("task_automations/"))["count"] == 1


async def test_other_keys(yard: Yard) -> None:
    made = await create(yard.api())
    path = f"task_automations/{made['id']}/"
    writes = [("POST", "task_automations/"), ("PATCH", path), ("PUT", path), ("DELETE", path),
              ("POST", path + "run/")]  # fmt: skip
    eve, reader = yard.api("eve", yard.other_project), yard.api("task:read")
    for method, where in writes[1:]:
        error(await eve.request(method, where, json=BODY), 404, "not_found")
    error(await eve.get(path), 404, "not_found")
    assert ok(await eve.get("task_automations/"))["count"] == 0
    error(await yard.api("eve").get(path), 403, "permission_denied")
    error(await yard.api(None).get(path), 401, "not_authenticated")
    for method, where in writes:
        refused = error(await reader.request(method, where, json=BODY), 403, "permission_denied")
        assert refused["detail"] == "API key missing required scope 'task:write'"
    assert ok(await reader.get(path)) == made
    # Everybody in the project shares them.
    assert ok(await yard.api("bob").patch(path, {"name": "Bob's"}))["name"] == "Bob's"
    for bad in ("x", uuid.uuid4(), uuid.uuid4().hex):
        error(await yard.api().get(f"task_automations/{bad}/"), 404, "not_found")
