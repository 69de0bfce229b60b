"""Staged artifacts over HTTP: prepare, upload, finalize, attach (tasks-api §4.8.2, §4.9, §4.10)."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.artifacts import MIB, Staged, item, named, send
from tests.support.yard import Yard, error, ok

TOO_LONG = "Ensure this field has no more than 255 characters."


async def staged(yard: Yard, key: str = "ada") -> Staged:
    api = yard.api(key)
    return Staged(api, (await api.create_task(title="A task"))["id"])


async def test_prepare(yard: Yard) -> None:
    task = await staged(yard)
    entries = await task.prepare(item("a.txt", size=3), {"name": "b", "type": "plan", "size": 4})
    assert [list(entry) for entry in entries] == 2 * [
        [
            "id",
            "name",
            "type",
            "source",
            "size",
            "content_type",
            "storage_path",
            "expires_in",
            "presigned_post",
        ]
    ]
    first, second = entries
    prefix = f"tasks/artifacts/team_{yard.project}/task_{task.task_id}/staged"
    assert first["storage_path"] == f"{prefix}/{first['id']}/a.txt"
    assert (len(first["id"]), first["expires_in"]) == (32, 3600)
    assert (second["source"], second["content_type"], second["size"]) == ("", "", 4)
    assert first["presigned_post"]["url"].startswith(yard.url)
    assert first["id"] != (await task.prepare(item("a.txt")))[0]["id"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a/b/c.txt", "c.txt"),
        ("folder/", "artifact"),
        ("..", "artifact"),
        ("a/.", "artifact"),
        ("ü 名.md", "ü 名.md"),
    ],
)
async def test_names_lose_their_folders(yard: Yard, name: str, safe: str) -> None:
    task = await staged(yard)
    entry = (await task.prepare(item(name)))[0]
    assert entry["name"] == safe
    assert entry["storage_path"].endswith(f"/{entry['id']}/{safe}")
    await send(task.api, entry)
    assert (await task.finalize(entry))[0]["name"] == safe


async def test_long_names_fit_into_paths(yard: Yard) -> None:
    task = await staged(yard)
    name = "名" * 250 + ".txt"
    entry = (await task.prepare(item(name)))[0]
    assert entry["name"] == name
    assert len(entry["storage_path"]) <= 500
    assert entry["storage_path"].endswith("名.txt")
    await send(task.api, entry)
    assert (await task.finalize(entry))[0]["name"] == name


@pytest.mark.parametrize(
    ("changed", "code", "attr", "detail"),
    [
        ({"name": ""}, "blank", "name", "This field may not be blank."),
        ({"name": "n" * 256}, "max_length", "name", TOO_LONG),
        ({"name": None}, "null", "name", "This field may not be null."),
        ({"type": "treasure"}, "invalid_choice", "type", '"treasure" is not a valid choice.'),
        ({"source": "s" * 65}, "max_length", "source", "Ensure this field has no more than 64 characters."),
        ({"content_type": "c" * 256}, "max_length", "content_type", TOO_LONG),
        ({"size": 0}, "min_value", "size", "Ensure this value is greater than or equal to 1."),
        ({"size": "many"}, "invalid_input", "size", "A valid integer is required."),
        ({"size": 30 * MIB + 1}, "invalid_input", "size", "notes.txt exceeds the 30MB attachment limit"),
        (
            {"name": "A.PDF", "size": 10 * MIB + 1},
            "invalid_input",
            "size",
            "A.PDF exceeds the 10MB attachment limit for PDFs in cloud runs",
        ),
        (
            {"content_type": "application/pdf; x=y", "size": 10 * MIB + 1},
            "invalid_input",
            "size",
            "notes.txt exceeds the 30MB attachment limit",
        ),
    ],
)  # fmt: skip
async def test_prepare_checks(yard: Yard, changed: dict[str, Any], code: str, attr: str, detail: str) -> None:
    # The task is not there: the body comes first.
    response = await Staged(yard.api(), str(uuid.uuid4())).call("prepare", item(), item() | changed)
    assert error(response, 400, code, f"artifacts__1__{attr}")["detail"] == detail


async def test_limits_themselves(yard: Yard) -> None:
    task = await staged(yard)
    sizes = [
        item("big.bin", size=30 * MIB),
        item("a.pdf", size=10 * MIB),
        item("a.pdf", size=30 * MIB, type="output"),
        item("b", size=1, content_type=""),
    ]
    assert [entry["size"] for entry in await task.prepare(*sizes)] == [one["size"] for one in sizes]


@pytest.mark.parametrize("action", ["prepare", "finalize"])
async def test_lists(yard: Yard, action: str) -> None:
    api = yard.api()
    path = f"tasks/{uuid.uuid4()}/staged_artifacts/{action}_upload/"
    empty = error(await api.post(path, {"artifacts": []}), 400, "invalid_input", "artifacts")
    assert empty["detail"] == "At least one artifact is required"
    error(await api.post(path, {}), 400, "required", "artifacts")
    error(await api.post(path, {"artifacts": "x"}), 400, "not_a_list", "artifacts")
    error(await api.post(path, {"artifacts": ["x"]}), 400, "not_a_dict", "artifacts__0")
    error(await api.post(path, {"artifacts": [item()] * 1001}), 400, "max_length", "artifacts")
    error(await api.post(path, {"artifacts": [{}]}), 400, "required", "artifacts__0__name")


async def test_finalize(yard: Yard) -> None:
    task = await staged(yard)
    entries = await task.prepare(item("a.txt", size=100), item("b.txt", size=100, content_type=""))
    await send(task.api, entries[0], b"hello")
    await send(task.api, entries[1], b"")
    final = await task.finalize(*entries)
    assert [list(entry) for entry in final] == 2 * [
        ["id", "name", "type", "source", "size", "content_type", "storage_path", "uploaded_at"]
    ]
    assert [entry["id"] for entry in final] == [entry["id"] for entry in entries]
    assert [entry["size"] for entry in final] == [5, 0]
    assert [entry["content_type"] for entry in final] == ["text/plain", "application/x-sent"]
    assert final[0]["uploaded_at"].endswith("+00:00")
    again = await task.finalize(*entries)
    assert [entry["id"] for entry in again] == [entry["id"] for entry in final]
    assert again[0]["uploaded_at"] > final[0]["uploaded_at"]


async def test_finalize_checks_in_order(yard: Yard) -> None:
    task, other = await staged(yard), await staged(yard)
    entry, second = await task.prepare(item(), item("b.txt"))
    foreign = await other.add()
    not_there = {"error": "Artifact upload not found in object storage"}
    invalid = {"error": "Artifact storage path is invalid for this task"}

    async def answer(*items: dict[str, Any]) -> Any:
        response = await task.call("finalize", *items)
        assert response.status_code == 400
        return response.json()

    assert await answer(named(entry)) == not_there
    assert await answer(named(foreign)) == invalid
    assert await answer(named(entry) | {"id": second["id"]}) == invalid
    assert (
        await answer(named(entry) | {"storage_path": entry["storage_path"].replace("/staged/", "/")})
        == invalid
    )
    await send(task.api, entry)
    # All or nothing, and the first bad one is told.
    assert await answer(named(entry), named(second), named(foreign)) == not_there
    assert await answer(named(entry), named(foreign), named(second)) == invalid
    assert (
        await yard.database.fetch("SELECT 1 FROM staged_artifacts WHERE task_id = %(id)s", id=task.task_id)
        == []
    )
    # Below the prefix, but never handed out.
    made_up = named(entry) | {"storage_path": entry["storage_path"] + ".2"}
    assert await answer(made_up) == not_there


async def test_finalize_looks_at_the_real_size(yard: Yard) -> None:
    """A form takes 64 KiB more than the limit; the limit is checked again."""
    task = await staged(yard)
    entry = (await task.prepare(item("a.pdf", size=10 * MIB)))[0]
    await send(task.api, entry, bytes(10 * MIB + 1))
    response = await task.call("finalize", named(entry))
    detail = "a.pdf exceeds the 10MB attachment limit for PDFs in cloud runs"
    assert (response.status_code, response.json()) == (400, {"error": detail})


async def test_form_takes_its_slack_and_no_more(yard: Yard) -> None:
    task = await staged(yard)
    entry = (await task.prepare(item(size=1)))[0]
    await send(task.api, entry, bytes(1 + 65536))
    form = entry["presigned_post"]
    response = await task.api.client.post(
        form["url"], data=form["fields"], files={"file": ("f", bytes(2 + 65536))}
    )
    assert response.status_code == 400
    assert "EntityTooLarge" in response.text


async def test_run_takes_staged_artifacts_once(yard: Yard) -> None:
    task = await staged(yard)
    first, second, third = [await task.add(name) for name in ("a", "b", "c")]
    run = ok(await task.run(second["id"], first["id"]))["latest_run"]
    assert run["artifacts"] == [second, first]
    assert run["state"]["pending_user_artifact_ids"] == [second["id"], first["id"]]
    runs = ok(await task.api.get(f"tasks/{task.task_id}/runs/"))["count"]
    again = await task.run(first["id"], third["id"])
    assert (again.status_code, again.json()) == (
        400,
        {
            "detail": "Some pending_user_artifact_ids are invalid or expired",
            "missing_artifact_ids": [first["id"]],
        },
    )
    # No run was made, and what was not at fault is still there.
    assert ok(await task.api.get(f"tasks/{task.task_id}/runs/"))["count"] == runs
    assert ok(await task.run(third["id"]))["latest_run"]["artifacts"] == [third]


async def test_artifacts_of_other_tasks_and_expired_ones(yard: Yard) -> None:
    task, other = await staged(yard), await staged(yard)
    foreign, own = await other.add(), await task.add()
    response = await task.run("nothing", foreign["id"], own["id"])
    assert response.json()["missing_artifact_ids"] == ["nothing", foreign["id"]]
    await yard.database.execute(
        "UPDATE staged_artifacts SET expires_at = now() WHERE task_id = %(id)s", id=task.task_id
    )
    response = await task.run(own["id"])
    assert response.json()["missing_artifact_ids"] == [own["id"]]
    await task.finalize(own)
    assert ok(await task.run(own["id"]))["latest_run"]["artifacts"][0]["id"] == own["id"]


async def test_staged_for_a_day(yard: Yard) -> None:
    task = await staged(yard)
    await task.add()
    row = await yard.database.fetch_one("SELECT expires_at FROM staged_artifacts")
    kept = await yard.database.fetch_one("SELECT keep_until FROM stored_objects")
    assert row is not None
    assert kept is not None
    for moment in (row["expires_at"], kept["keep_until"]):
        assert timedelta(hours=23, minutes=50) < moment - datetime.now(UTC) <= timedelta(days=1)


async def test_only_one_of_many_runs_gets_them(yard: Yard) -> None:
    task = await staged(yard)
    one, two = await task.add("a"), await task.add("b")
    ids = [(one["id"], two["id"]), (two["id"], one["id"])] * 4
    responses = await asyncio.gather(*(task.run(*pair) for pair in ids))
    assert sorted(response.status_code for response in responses) == [200] + 7 * [400]
    runs = ok(await task.api.get(f"tasks/{task.task_id}/runs/"))
    assert runs["count"] == 1
    assert len(runs["results"][0]["artifacts"]) == 2


async def test_finalized_at_once(yard: Yard) -> None:
    task = await staged(yard)
    entries = await task.prepare(*(item(f"{n}") for n in range(50)))
    for entry in entries:
        await send(task.api, entry)
    await asyncio.gather(
        *(task.finalize(entry) for entry in entries),
        *(task.finalize(*order) for order in (entries, entries[::-1]) for _ in range(4)),
    )
    ids = [entry["id"] for entry in entries]
    assert [entry["id"] for entry in ok(await task.run(*ids))["latest_run"]["artifacts"]] == ids


async def test_same_one_twice_in_a_request(yard: Yard) -> None:
    task = await staged(yard)
    entry = await task.add()
    assert len(await task.finalize(entry, entry)) == 2
    assert ok(await task.run(entry["id"], entry["id"]))["latest_run"]["artifacts"][0]["id"] == entry["id"]


@pytest.mark.parametrize("action", ["prepare", "finalize"])
async def test_who_may(yard: Yard, action: str) -> None:
    task = await staged(yard)
    entry = await task.add()
    body = item() if action == "prepare" else named(entry)

    async def call(key: str | None, task_id: str = task.task_id, project: int | None = None) -> Any:
        return await Staged(yard.api(key, project), task_id).call(action, body)

    ok(await call("bob"))
    ok(await call("task:write"))
    refused = error(await call("task:read"), 403, "permission_denied")
    assert refused["detail"] == "API key missing required scope 'task:write'"
    error(await call(None), 401, "not_authenticated")
    error(await call("eve"), 403, "permission_denied")
    error(await call("eve", project=yard.other_project), 404, "not_found")
    error(await call("ada", str(uuid.uuid4())), 404, "not_found")
    error(await call("ada", "x"), 404, "not_found")
    await yard.api().request("DELETE", f"tasks/{task.task_id}/")
    error(await call("ada"), 404, "not_found")
