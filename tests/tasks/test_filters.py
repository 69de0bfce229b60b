"""Filters of the list, and query parameters that narrow the other endpoints (tasks-api §4.1)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from taskyard.db.engine import Database
from tests.conftest import make_settings
from tests.support.yard import Api, Json, Yard, error, ok, open_yard

ONE_OF_EACH: dict[str, Json] = {
    "plain": {},
    "other": {"repository": "acme/other", "origin_product": "slack"},
    "web": {"repository": "Acme/Web"},
    "far": {"repository": "acmex/web"},
    "web2": {"repository": "acme/web-2"},
    "empty": {"repository": ""},
    "internal": {"internal": True, "repository": "acme/web"},
    "archived": {"archived": True, "repository": "acme/web"},
    "both": {"archived": True, "internal": True},
}


async def titles(api: Api, **query: Any) -> list[str]:
    """Titles of the list; its count is that of the list."""
    found = ok(await api.get("tasks/", params=query))
    assert found["count"] == len(found["results"])
    return [task["title"] for task in found["results"]]


QUERIES: list[tuple[dict[str, str], list[str]]] = [
    ({}, ["empty", "web2", "far", "web", "other", "plain"]),
    ({"origin_product": "slack"}, ["other"]),
    ({"origin_product": "nowhere"}, []),
    ({"organization": "acme"}, ["web2", "web", "other"]),
    ({"organization": "ACME"}, ["web2", "web", "other"]),
    ({"organization": "acme/web"}, []),
    ({"organization": "a%"}, []),
    ({"repository": "acme/web"}, ["web"]),
    ({"repository": " ACME/Web "}, ["web"]),
    ({"repository": "web"}, ["far", "web"]),
    ({"repository": "WEB"}, ["far", "web"]),
    ({"repository": "we_"}, []),
    ({"repository": "/web"}, []),
    ({"organization": "acmex", "repository": "web"}, ["far"]),
    ({"internal": "true"}, ["internal"]),
    ({"internal": "True"}, ["internal"]),
    ({"internal": "1", "repository": "acme/web"}, ["internal"]),
    ({"internal": "false", "repository": "acme/web"}, ["web"]),
    ({"internal": "", "repository": "acme/web"}, ["web"]),
    ({"internal": "all", "repository": "acme/web"}, ["internal", "web"]),
    ({"archived": "true"}, ["archived"]),
    ({"archived": "all", "repository": "acme/web"}, ["archived", "web"]),
    ({"archived": "true", "internal": "true"}, ["both"]),
    ({"archived": "all", "internal": "all", "limit": "3"}, ["both", "archived", "internal"]),
    ({"search": "  ", "repository": "acme/web"}, ["web"]),
    ({"unknown": "x", "basic": "true", "all_team_tasks": "1", "organization": "acmex"}, ["far"]),
]


async def test_list(yard: Yard) -> None:
    api = yard.api()
    for title, fields in ONE_OF_EACH.items():
        await api.create_task(title=title, **fields)
    for query, expected in QUERIES:
        found = ok(await api.get("tasks/", params=query))
        assert [task["title"] for task in found["results"]] == expected, query
        if "limit" not in query:
            assert found["count"] == len(expected), query


BAD = [
    ({"status": "lost"}, "invalid_choice", '"lost" is not a valid choice.'),
    ({"status": ""}, "invalid_choice", '"" is not a valid choice.'),
    ({"created_by": "ada"}, "invalid_input", "A valid integer is required."),
    ({"created_by": ""}, "invalid_input", "A valid integer is required."),
    ({"internal": "perhaps"}, "invalid_input", "Must be a valid boolean."),
    ({"archived": "perhaps"}, "invalid_input", "Must be a valid boolean."),
    ({"repository": " "}, "blank", "This field may not be blank."),
    ({"search": "a\0b"}, "null_characters_not_allowed", "Null characters are not allowed."),
]


async def test_bad_values(yard: Yard) -> None:
    for query, code, detail in BAD:
        (attr,) = query
        refused = error(await yard.api().get("tasks/", params=query), 400, code, attr)
        assert (refused["detail"], refused["type"]) == (detail, "validation_error")


async def test_created_by(yard: Yard) -> None:
    await yard.api("ada").create_task(title="of ada")
    await yard.api("bob").create_task(title="of bob")
    api = yard.api()
    assert await titles(api, created_by=yard.users["ada"]) == ["of ada"]
    assert await titles(api, created_by=f" {yard.users['bob']} ") == ["of bob"]
    for nobody in ("0", "-1", str(2**31), "9" * 40):
        assert await titles(api, created_by=nobody) == []


async def test_status_is_of_the_latest_run(yard: Yard) -> None:
    api = yard.api()
    await api.create_task(title="without a run")
    old = await api.start("old")
    ok(await api.patch(old.path(), {"status": "failed"}))
    new = ok(await api.post(f"tasks/{old.task_id}/run/"))["latest_run"]["id"]
    assert await titles(api, status="failed") == []
    assert await titles(api, status="queued") == ["A task"]
    # The older run changes: nothing to the task.
    ok(await api.patch(old.path(), {"status": "completed"}))
    assert await titles(api, status="completed") == []
    ok(await api.patch(f"tasks/{old.task_id}/runs/{new}/", {"status": "cancelled"}))
    assert await titles(api, status="cancelled") == ["A task"]
    assert await titles(api, status="queued") == []


async def test_stage_is_of_any_run(yard: Yard) -> None:
    api = yard.api()
    await api.create_task(title="without a run")
    first = await api.start("x")
    second = ok(await api.post(f"tasks/{first.task_id}/run/"))["latest_run"]["id"]
    for run in (first.id, second):
        ok(await api.patch(f"tasks/{first.task_id}/runs/{run}/", {"stage": "build"}))
    assert await titles(api, stage="build") == ["A task"]
    ok(await api.patch(f"tasks/{first.task_id}/runs/{second}/", {"stage": "review"}))
    assert await titles(api, stage="build") == ["A task"]
    assert await titles(api, stage="review", status="queued") == ["A task"]
    assert await titles(api, stage="review", search="task") == ["A task"]
    assert await titles(api, stage="buil") == []


async def test_filters_combine(yard: Yard) -> None:
    api = yard.api()
    await api.create_task(title="A", repository="acme/web", origin_product="slack")
    await api.create_task(title="B", repository="acme/web")
    query = {"repository": "web", "organization": "acme", "created_by": yard.users["ada"], "search": "a"}
    assert await titles(api, **query, origin_product="slack") == ["A"]
    assert await titles(api, **query, origin_product="slack", status="queued") == []


@pytest.mark.parametrize(
    ("fits", "fails"),
    [
        ({"repository": "web"}, {"repository": "shop"}),
        ({"organization": "ACME"}, {"organization": "other"}),
        ({"origin_product": "slack"}, {"origin_product": "user_created"}),
        ({"created_by": "1"}, {"created_by": "2"}),
        ({"stage": "build"}, {"stage": "review"}),
        ({"search": "zz", "status": "failed", "internal": "true", "archived": "true"}, {"organization": "x"}),
    ],
)
async def test_narrowed_endpoints(yard: Yard, fits: dict[str, str], fails: dict[str, str]) -> None:
    api = yard.api()
    run = await api.start("x", repository="acme/web")
    path = f"tasks/{run.task_id}/"
    ok(await api.patch(run.path(), {"stage": "build"}))
    ok(await api.patch(path, {"origin_product": "slack"}))
    assert yard.users["ada"] == 1
    error(await api.get(path, params=fails), 404, "not_found")
    for method in ("PATCH", "PUT"):
        error(await api.request(method, path, params=fails, json={"title": "no"}), 404, "not_found")
    error(await api.request("DELETE", path, params=fails), 404, "not_found")
    assert ok(await api.get(path, params=fits))["title"] == "A task"
    # What the change makes of the task does not matter to its answer.
    moved = ok(await api.request("PATCH", path, params=fits, json={"repository": "a/b", "title": "yes"}))
    assert (moved["title"], moved["repository"]) == ("yes", "a/b")
    ok(await api.patch(path, {"repository": "acme/web"}))
    assert (await api.request("DELETE", path, params=fits)).status_code == 204


async def test_narrowing_is_checked_before_the_look_up(yard: Yard) -> None:
    api = yard.api()
    path = "tasks/00000000-0000-4000-8000-000000000000/"
    for method in ("GET", "PATCH", "DELETE"):
        response = await api.request(method, path, params={"created_by": "x"})
        error(response, 400, "invalid_input", "created_by")


async def test_archiving(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task(title="A")
    assert (task["archived"], task["archived_at"]) == (False, None)
    path = f"tasks/{task['id']}/"
    archived = ok(await api.patch(path, {"archived": True}))
    assert archived["archived"] is True
    assert archived["archived_at"] > task["created_at"]
    assert await titles(api) == []
    # It stays what it was, and is found by its id.
    again = ok(await api.patch(path, {"archived": True, "archived_at": None}))
    assert again["archived_at"] == archived["archived_at"]
    assert ok(await api.get(path)) == again
    back = ok(await api.patch(path, {"archived": False}))
    assert (back["archived"], back["archived_at"]) == (False, None)
    assert await titles(api) == ["A"]
    error(await api.patch(path, {"archived": None}), 400, "null", "archived")


async def test_visible_to_the_creator_only(tmp_path: Any, database_url: str, database: Database) -> None:
    settings = make_settings(tmp_path, database_url, tasks={"visibility": "creator"})
    async with open_yard(settings, database) as yard:
        ada, bob = yard.api("ada"), yard.api("bob")
        mine = await ada.create_task(title="mine", repository="acme/mine")
        theirs = await bob.create_task(title="theirs", repository="acme/theirs")
        shared = await bob.create_task(title="shared", origin_product="hogdesk")
        nobodys = await bob.create_task(title="nobody's")
        await database.execute("UPDATE tasks SET created_by_id = NULL WHERE id = %(id)s", id=nobodys["id"])
        assert await titles(ada) == ["nobody's", "shared", "mine"]
        assert await titles(ada, search="s") == ["nobody's", "shared"]
        assert await titles(bob) == ["nobody's", "shared", "theirs"]
        path = f"tasks/{theirs['id']}/"
        for method in ("GET", "PATCH", "DELETE"):
            error(await ada.request(method, path), 404, "not_found")
        error(await ada.post(f"{path}run/"), 404, "not_found")
        assert ok(await ada.get("tasks/repositories/")) == {"repositories": ["acme/mine"]}
        ids = [task["id"] for task in (mine, theirs, shared)]
        summaries = ok(await ada.post("tasks/summaries/", {"ids": ids}))
        assert [item["title"] for item in summaries["results"]] == ["shared", "mine"]
        # A change that hides the task from its author is still answered.
        changed = ok(await ada.patch(f"tasks/{shared['id']}/", {"origin_product": "slack"}))
        assert changed["origin_product"] == "slack"
        error(await ada.get(f"tasks/{shared['id']}/"), 404, "not_found")


async def test_repositories(yard: Yard) -> None:
    api = yard.api()
    for name in ("b/z", "a/z-1", "a/z", "A/Z", "", None, "é/x"):
        await api.create_task(repository=name)
    await api.create_task(repository="a/internal", internal=True)
    gone = await api.create_task(repository="a/gone")
    await api.create_task(repository="a/archived", archived=True)
    assert (await api.request("DELETE", f"tasks/{gone['id']}/")).status_code == 204
    await yard.api("eve", yard.other_project).create_task(repository="eve/secret")
    found = ok(await api.get("tasks/repositories/"))
    assert found == {"repositories": ["a/archived", "a/z", "a/z-1", "b/z", "é/x"]}


async def test_summaries(yard: Yard) -> None:
    api = yard.api("task:read")
    run = await yard.api().start("x", repository="acme/web")
    bare = await yard.api().create_task(title="bare", internal=True, archived=True)
    gone = await yard.api().create_task()
    await yard.api().request("DELETE", f"tasks/{gone['id']}/")
    foreign = await yard.api("eve", yard.other_project).create_task()
    ids = [run.task_id, bare["id"], gone["id"], foreign["id"], "00000000-0000-4000-8000-000000000000"]
    found = ok(await api.post("tasks/summaries/", {"ids": [*ids, run.task_id]}))
    assert (found["count"], found["next"], found["previous"]) == (2, None, None)
    keys = ("id", "title", "repository", "created_at", "updated_at")
    task = ok(await api.get(f"tasks/{run.task_id}/"))
    assert found["results"] == [
        {key: bare[key] for key in keys} | {"latest_run": None, "origin_product": "user_created"},
        {key: task[key] for key in keys}
        | {"latest_run": {"status": "queued", "environment": "cloud"}, "origin_product": "user_created"},
    ]
    first = ok(await api.post("tasks/summaries/?limit=1", {"ids": ids}))
    assert (first["count"], len(first["results"])) == (2, 1)
    second = ok(await api.post(first["next"], {"ids": ids}))
    assert [first["results"], second["results"]] == [[item] for item in found["results"]]
    assert (second["next"], second["previous"]) == (
        None,
        f"{yard.url}/api/projects/{yard.project}/tasks/summaries/?limit=1",
    )
    beyond = ok(await api.post("tasks/summaries/?offset=7", {"ids": ids}))
    assert (beyond["count"], beyond["results"]) == (2, [])


BAD_SUMMARIES: list[tuple[Json, str, str, str]] = [
    ({}, "required", "ids", "This field is required."),
    ({"ids": None}, "null", "ids", "This field may not be null."),
    ({"ids": []}, "empty", "ids", "This list may not be empty."),
    ({"ids": "x"}, "not_a_list", "ids", 'Expected a list of items but got type "str".'),
    ({"ids": ["x"]}, "invalid_input", "ids__0", "Must be a valid UUID."),
    ({"ids": [7]}, "invalid_input", "ids__0", "Must be a valid UUID."),
    (
        {"ids": ["00000000-0000-4000-8000-000000000000"] * 5001},
        "max_length",
        "ids",
        "Ensure this field has no more than 5000 elements.",
    ),
]


async def test_bad_summaries(yard: Yard) -> None:
    for body, code, attr, detail in BAD_SUMMARIES:
        assert error(await yard.api().post("tasks/summaries/", body), 400, code, attr)["detail"] == detail


async def test_most_summaries(yard: Yard) -> None:
    ids = ["00000000-0000-4000-8000-000000000000"] * 4999
    task = await yard.api().create_task()
    assert ok(await yard.api().post("tasks/summaries/", {"ids": [*ids, task["id"]]}))["count"] == 1


async def test_who_may(yard: Yard) -> None:
    for path in ("tasks/", "tasks/repositories/"):
        assert ok(await yard.api("task:read").get(path)) is not None
        error(await yard.api(None).get(path), 401, "not_authenticated")
        error(await yard.api("eve").get(path), 403, "permission_denied")
    error(await yard.api(None).post("tasks/summaries/", {"ids": []}), 401, "not_authenticated")
    error(await yard.api("eve").post("tasks/summaries/", {"ids": []}), 403, "permission_denied")
    error(await yard.api("task:read").post("tasks/", {}), 403, "permission_denied")


async def test_pages_do_not_overlap(yard: Yard) -> None:
    api = yard.api()
    made = await asyncio.gather(*(api.create_task(title=str(n)) for n in range(25)))
    seen: list[str] = []
    link: str | None = "tasks/?limit=4&search="
    while link:
        page = ok(await api.get(link))
        assert page["count"] == 25
        seen += [task["id"] for task in page["results"]]
        link = page["next"]
    in_order = sorted(made, key=lambda task: task["created_at"], reverse=True)
    assert seen == [task["id"] for task in in_order]
