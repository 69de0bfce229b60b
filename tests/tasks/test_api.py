"""Task endpoints over HTTP (tasks-api §1, §2, §4)."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from tests.support.yard import Yard, error, ok

KEYS = [
    "id", "task_number", "slug", "title", "title_manually_set", "description", "origin_product", "repository",
    "github_integration", "github_user_integration", "signal_report", "json_schema", "internal", "latest_run",
    "created_at", "updated_at", "created_by", "ci_prompt", "archived", "archived_at",
]  # fmt: skip


async def test_create_and_retrieve(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task(
        title=" Fix it ", description="Please", repository="Acme/Shop", ci_prompt="Look"
    )
    assert list(task) == KEYS
    assert (task["title"], task["title_manually_set"], task["repository"]) == ("Fix it", True, "acme/shop")
    assert (task["latest_run"], task["task_number"], task["slug"]) == (None, 0, "TES-0")
    assert task["created_by"]["id"] == yard.users["ada"]
    assert task["created_at"].endswith("Z")
    assert ok(await api.get(f"tasks/{task['id']}/")) == task


async def test_nothing_is_required(yard: Yard) -> None:
    response = await yard.api().post("tasks/", headers={"Content-Type": "application/json"}, content=b"")
    task = ok(response, 201)
    assert (task["title"], task["description"], task["repository"], task["title_manually_set"]) == (
        "",
        "",
        None,
        False,
    )


@pytest.mark.parametrize(
    ("description", "title"),
    [
        ("Fix the login\nand more", "Fix the login"),
        ("x" * 61, "x" * 57 + "..."),
        ("y" * 60, "y" * 60),
        ("  ", ""),
    ],
)
async def test_title_from_description(yard: Yard, description: str, title: str) -> None:
    task = await yard.api().create_task(description=description)
    assert (task["title"], task["title_manually_set"]) == (title, False)


async def test_update_changes_what_was_sent(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task(description="Keep", repository="a/b")
    for method in ("PATCH", "PUT"):
        body = ok(await api.request(method, f"tasks/{task['id']}/", json={"title": method, "id": "x"}))
        assert (body["title"], body["description"], body["repository"]) == (method, "Keep", "a/b")
        assert body["title_manually_set"] is True
        assert body["updated_at"] > task["updated_at"]
        task = body


async def test_delete_is_soft_and_final(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    response = await api.request("DELETE", f"tasks/{task['id']}/")
    assert (response.status_code, response.content) == (204, b"")
    error(await api.get(f"tasks/{task['id']}/"), 404, "not_found")
    error(await api.request("DELETE", f"tasks/{task['id']}/"), 404, "not_found")
    error(await api.post(f"tasks/{task['id']}/run/"), 404, "not_found")
    assert ok(await api.get("tasks/"))["count"] == 0
    # The number is not given out again.
    assert (await api.create_task())["task_number"] == 1


async def test_numbers_do_not_collide(yard: Yard) -> None:
    api = yard.api()
    tasks = await asyncio.gather(*(api.create_task(title=str(n)) for n in range(50)))
    assert sorted(task["task_number"] for task in tasks) == list(range(50))


async def test_changes_at_once_keep_each_other(yard: Yard) -> None:
    """Of different fields of one task, while runs of it are created and started."""
    api = yard.api()
    task = await api.create_task(title="x")
    one = f"tasks/{task['id']}/"
    fields = [
        ("description", "d"),
        ("ci_prompt", "c"),
        ("repository", "o/r"),
        ("internal", True),
        ("title", "t"),
    ]
    answers = await asyncio.gather(
        *(api.patch(one, dict([fields[n % 5]])) for n in range(50)),
        *(api.post(one + rest, {}) for rest in ("run/", "runs/") for _ in range(25)),
    )
    assert {response.status_code for response in answers} == {200, 201}
    changed = ok(await api.get(one))
    assert [changed[name] for name, _ in fields] == [value for _, value in fields]
    assert ok(await api.get(one + "runs/"))["count"] == 50
    stamps = [response.json()["updated_at"] for response in answers[:50]]
    assert len(set(stamps)) == 50, "clients drop what is not newer"


async def test_list_pages(yard: Yard) -> None:
    api = yard.api()
    ids = [(await api.create_task(title=str(n)))["id"] for n in range(5)]
    await api.create_task(internal=True)
    first = ok(await api.get("tasks/", params={"limit": 2, "basic": "x"}))
    assert (first["count"], first["previous"]) == (5, None)
    assert first["next"] == f"{yard.url}/api/projects/{yard.project}/tasks/?basic=x&limit=2&offset=2"
    second = ok(await api.get(first["next"]))
    third = ok(await api.get(second["next"]))
    assert third["next"] is None
    assert [t["id"] for page in (first, second, third) for t in page["results"]] == ids[::-1]
    assert ok(await api.get(second["previous"]))["results"] == first["results"]
    for odd in ("0", "-1", "x", "", "９"):
        assert len(ok(await api.get("tasks/", params={"limit": odd}))["results"]) == 5


@pytest.mark.parametrize(
    ("body", "code", "attr", "detail"),
    [
        ({"title": "x" * 256}, "max_length", "title", "Ensure this field has no more than 255 characters."),
        ({"title": 10**300}, "max_length", "title", "Ensure this field has no more than 255 characters."),
        ({"title": None}, "null", "title", "This field may not be null."),
        ({"title": ["x"]}, "invalid_input", "title", "Not a valid string."),
        ({"origin_product": "nowhere"}, "invalid_choice", "origin_product", '"nowhere" is not a valid choice.'),
        ({"repository": "a/b/c"}, "invalid_input", "repository",
         "Repository must be in the format organization/repository"),
        # In lower case that letter is two.
        ({"repository": "İ" * 253 + "/x"}, "max_length", "repository",
         "Ensure this field has no more than 255 characters."),
        ({"internal": "perhaps"}, "invalid_input", "internal", "Must be a valid boolean."),
        ({"github_integration": 7}, "does_not_exist", "github_integration",
         'Invalid pk "7" - object does not exist.'),
        ({"github_integration": "x"}, "invalid_input", "github_integration", "A valid integer is required."),
        ({"signal_report_task_relationship": "implementation"}, "invalid_input",
         "signal_report_task_relationship", "Requires signal_report when set."),
        ({"json_schema": [1]}, "invalid_input", "json_schema", "json_schema must be a JSON Schema object."),
    ],
)  # fmt: skip
async def test_bad_fields(yard: Yard, body: dict[str, object], code: str, attr: str, detail: str) -> None:
    refused = error(await yard.api().post("tasks/", body), 400, code, attr)
    assert (refused["detail"], refused["type"]) == (detail, "validation_error")


async def test_schema_that_is_none_is_refused(yard: Yard) -> None:
    refused = error(
        await yard.api().post("tasks/", {"json_schema": {"type": "numbr"}}),
        400,
        "invalid_input",
        "json_schema",
    )
    assert "'numbr' is not valid" in refused["detail"]


async def test_unknown_fields_are_ignored_whatever_they_hold(yard: Yard) -> None:
    sent = b'{"title": "t", "later": "a\\u0000b", "\\u0000": 1, "more": {"x": ["\\ud800"]}}'
    headers = {"Content-Type": "application/json"}
    task = ok(await yard.api().post("tasks/", content=sent, headers=headers), 201)
    assert (task["title"], "later" in task) == ("t", False)


async def test_bodies(yard: Yard) -> None:
    api = yard.api()
    json_type = {"Content-Type": "application/json"}
    error(await api.post("tasks/", content=b'{"a": ', headers=json_type), 400, "parse_error")
    error(await api.post("tasks/", content=b"[1]", headers=json_type), 400, "invalid_input")
    error(await api.post("tasks/", content=b"[" * 100_000, headers=json_type), 400, "parse_error")
    deep = b'{"json_schema": ' + b"[" * 5000 + b'"\\ud83d\\ude00"' + b"]" * 5000 + b"}"
    error(await api.post("tasks/", content=deep, headers=json_type), 400, "parse_error")
    error(
        await api.post("tasks/", content=b"a=1", headers={"Content-Type": "text/plain"}),
        415,
        "unsupported_media_type",
    )


async def test_paths(yard: Yard) -> None:
    api = yard.api()
    assert (await api.get("tasks")).status_code == 200
    for bad in ("1", "x", str(uuid.uuid4()), uuid.uuid4().hex):
        error(await api.get(f"tasks/{bad}/"), 404, "not_found")
    for method in ("HEAD", "OPTIONS"):
        response = await api.request(method, "tasks/")
        assert (response.status_code, response.content) == (200, b"")
    error(await api.request("DELETE", "tasks/"), 405, "method_not_allowed")
    error(await api.get("/api/nowhere"), 404, "not_found")
    current = ok(await yard.api(project="@current").get("tasks/"))
    assert current == ok(await api.get("tasks/"))


async def test_presence_of_a_device(yard: Yard) -> None:
    """There are no push messages, so there is nothing to hold back."""
    task = await yard.api().create_task(title="x")
    for method in ("POST", "DELETE", "DELETE"):
        sent = await yard.api().request(method, f"tasks/{task['id']}/presence/", json={"device_id": "d"})
        assert (sent.status_code, sent.content) == (204, b"")
        gone = await yard.api().request(method, f"tasks/{uuid.uuid4()}/presence/", json={})
        error(gone, 404, "not_found")
    error(await yard.api().post(f"tasks/{task['id']}/presence/", [1]), 400, "invalid_input")
