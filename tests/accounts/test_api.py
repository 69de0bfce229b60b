"""What clients ask about people and projects (tasks-api §11, §12; real-clients §6, §8)."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from taskyard.accounts import admin
from tests.support.browser import open_browser
from tests.support.yard import Api, Yard, error, ok

BRIEF = {"id", "name", "slug", "logo_media_id", "membership_level"}


async def test_me(yard: Yard) -> None:
    me = ok(await yard.api().get("/api/users/@me/"))
    assert me["id"] == yard.users["ada"]
    assert (me["email"], me["first_name"], me["is_staff"], me["has_password"]) == (
        "ada@example.org",
        "ada",
        True,
        False,
    )
    assert len(me["uuid"]) == 36
    assert me["distinct_id"]
    assert (me["team"]["id"], me["team"]["name"]) == (yard.project, "Test Yard")
    assert me["organization"]["id"] == me["team"]["organization"]
    assert [team["id"] for team in me["organization"]["teams"]] == [yard.project]
    assert [set(entry) for entry in me["organizations"]] == [BRIEF]
    assert not {"password", "password_hash"} & set(me)


async def test_me_is_the_creator_of_my_tasks(yard: Yard) -> None:
    me = ok(await yard.api().get("/api/users/@me"))
    created_by = (await yard.api().create_task(title="x"))["created_by"]
    for name in ("id", "uuid", "distinct_id", "email"):
        assert created_by[name] == me[name]


async def test_me_without_a_project(yard: Yard) -> None:
    await admin.create_user(yard.database, "new@example.org")
    yard.keys["new"] = (await admin.create_key(yard.database, "new@example.org", ["task:read"]))["key"]
    me = ok(await yard.api("new").get("/api/users/@me/"))
    assert (me["team"], me["organization"], me["organizations"]) == (None, None, [])
    assert ok(await yard.api("new").get("/api/projects/"))["results"] == []
    error(await yard.api("new").get("/api/organizations/@current/"), 404, "not_found")


async def test_projects_are_the_callers_own(yard: Yard) -> None:
    await admin.add_member(yard.database, "ada@example.org", yard.other_project, "admin")
    listed = ok(await yard.api().get("/api/projects/"))
    assert listed["count"] == 2
    assert [(entry["id"], entry["effective_membership_level"]) for entry in listed["results"]] == [
        (yard.project, 1),
        (yard.other_project, 8),
    ]
    first = ok(await yard.api().get("/api/projects/?limit=1"))
    assert [entry["id"] for entry in first["results"]] == [yard.project]
    second = ok(await yard.api().get(first["next"]))
    assert [entry["id"] for entry in second["results"]] == [yard.other_project]
    assert [entry["id"] for entry in ok(await yard.api("eve").get("/api/projects/"))["results"]] == [
        yard.other_project
    ]


async def test_one_project(yard: Yard) -> None:
    project = ok(await yard.api().get(f"/api/projects/{yard.project}/"))
    assert (project["id"], project["project_id"], project["name"]) == (
        yard.project,
        yard.project,
        "Test Yard",
    )
    assert ok(await yard.api().get("/api/projects/@current/")) == project
    assert ok(await yard.api().get("/api/users/@me/"))["team"] == project
    error(await yard.api().get(f"/api/projects/{yard.other_project}/"), 403, "permission_denied")
    error(await yard.api().get("/api/projects/987654321/"), 404, "not_found")


async def test_organizations(yard: Yard) -> None:
    listed = ok(await yard.api().get("/api/organizations/"))
    (entry,) = listed["results"]
    assert set(entry) >= BRIEF
    assert [project["id"] for project in entry["projects"]] == [yard.project]
    for name in (entry["id"], entry["id"].upper(), "@current"):
        assert ok(await yard.api().get(f"/api/organizations/{name}/")) == entry
    for name in (str(uuid4()), "x", "1"):
        error(await yard.api().get(f"/api/organizations/{name}/"), 404, "not_found")


async def test_another_organization_is_not_there(yard: Yard) -> None:
    row = await yard.database.fetch_one(
        "WITH o AS (INSERT INTO organizations (name) VALUES ('Elsewhere') RETURNING id)"
        " INSERT INTO projects (organization_id, name) SELECT id, 'p' FROM o RETURNING organization_id"
    )
    assert row is not None
    error(await yard.api().get(f"/api/organizations/{row['organization_id']}/"), 404, "not_found")


# --- what a key is limited to --------------------------------------------------------------------------


async def limited(yard: Yard, **limits: Any) -> Api:
    """ada, in both projects, with a key that is limited."""
    await admin.add_member(yard.database, "ada@example.org", yard.other_project)
    async with open_browser(yard, "ada") as browser:
        made = await browser.call(
            "POST", "/api/personal_api_keys/", json={"label": "l", "scopes": ["*"], **limits}
        )
    yard.keys["limited"] = ok(made, 201)["value"]
    return yard.api("limited")


async def test_a_limited_key_shows_only_its_projects(yard: Yard) -> None:
    api = await limited(yard, scoped_teams=[yard.other_project, yard.other_project])
    assert [entry["id"] for entry in ok(await api.get("/api/projects/"))["results"]] == [yard.other_project]
    me = ok(await api.get("/api/users/@me/"))
    # With one project only, that is the current one, whatever the user's own is.
    assert me["team"]["id"] == yard.other_project
    assert [team["id"] for team in me["organization"]["teams"]] == [yard.other_project]
    assert ok(await api.get("/api/projects/@current/"))["id"] == yard.other_project
    error(await api.get(f"/api/projects/{yard.project}/tasks/"), 403, "permission_denied")


async def test_a_key_limited_to_an_organization(yard: Yard) -> None:
    organization = ok(await yard.api().get("/api/organizations/@current/"))["id"]
    api = await limited(yard, scoped_organizations=[organization])
    assert ok(await api.get("tasks/"))["count"] == 0
    await yard.database.execute("UPDATE api_keys SET organization_ids = ARRAY[gen_random_uuid()]")
    error(await api.get("tasks/"), 403, "permission_denied")
    assert ok(await api.get("/api/projects/"))["count"] == 0
    assert ok(await api.get("/api/users/@me/"))["team"] is None


# --- personal API keys --------------------------------------------------------------------------------


async def test_the_key_of_a_request(yard: Yard) -> None:
    key = ok(await yard.api("task:read").get("/api/personal_api_keys/@current"))
    assert (key["scopes"], key["scoped_teams"], key["scoped_organizations"]) == (["task:read"], None, None)
    assert key["user_id"] == yard.users["ada"]
    assert "value" not in key
    assert yard.keys["task:read"] not in str(key)
    async with open_browser(yard, "ada") as browser:
        error(await browser.get("/api/personal_api_keys/@current"), 404, "not_found")


async def test_last_use_is_noted(yard: Yard) -> None:
    assert ok(await yard.api().get("/api/personal_api_keys/@current"))["last_used_at"] is not None
    await yard.database.execute("UPDATE api_keys SET last_used_at = now() - interval '1 hour'")
    first = await yard.database.fetch(
        "SELECT last_used_at FROM api_keys WHERE last_used_at > now() - interval '1 min'"
    )
    assert first == []
    await yard.api().get("tasks/")
    rows = await yard.database.fetch("SELECT 1 FROM api_keys WHERE last_used_at > now() - interval '1 min'")
    assert len(rows) == 1


async def test_keys_are_made_listed_and_revoked(yard: Yard) -> None:
    async with open_browser(yard, "bob") as browser:
        body = {"label": " ci ", "scopes": ["task:read"], "scoped_teams": [yard.project]}
        made = ok(await browser.call("POST", "/api/personal_api_keys/", json=body), 201)
        assert made["value"].startswith("phx_")
        assert (made["label"], made["scopes"], made["scoped_teams"]) == ("ci", ["task:read"], [yard.project])
        yard.keys["new"] = made["value"]
        assert ok(await yard.api("new").get("tasks/"))["count"] == 0
        listed = (await browser.get("/api/personal_api_keys/")).json()
        assert {entry["label"] for entry in listed} == {"command line", "ci"}
        assert not any("value" in entry for entry in listed)
        path = f"/api/personal_api_keys/{made['id']}/"
        assert ok(await browser.get(path))["mask_value"] == made["mask_value"]
        assert (await browser.call("DELETE", path)).status_code == 204
        error(await yard.api("new").get("tasks/"), 401, "authentication_failed")
        for method in ("GET", "DELETE"):
            error(await browser.call(method, path), 404, "not_found")


async def test_keys_of_others_are_not_there(yard: Yard) -> None:
    theirs = ok(await yard.api("ada").get("/api/personal_api_keys/@current"))["id"]
    async with open_browser(yard, "bob") as browser:
        for method in ("GET", "DELETE"):
            error(await browser.call(method, f"/api/personal_api_keys/{theirs}/"), 404, "not_found")
    assert (await yard.api("ada").get("tasks/")).status_code == 200


async def test_a_key_that_expires(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        body = {"label": "x", "scopes": ["*"], "expires_at": "2099-01-01T00:00:00Z"}
        made = ok(await browser.call("POST", "/api/personal_api_keys/", json=body), 201)
        assert made["expires_at"] == "2099-01-01T00:00:00.000000Z"
        body["expires_at"] = "2020-01-01T00:00:00Z"
        error(
            await browser.call("POST", "/api/personal_api_keys/", json=body),
            400,
            "invalid_input",
            "expires_at",
        )


@pytest.mark.parametrize(
    ("body", "code", "attr"),
    [
        ({"scopes": ["*"]}, "required", "label"),
        ({"label": " ", "scopes": ["*"]}, "blank", "label"),
        ({"label": "x" * 41, "scopes": ["*"]}, "max_length", "label"),
        ({"label": "x"}, "required", "scopes"),
        ({"label": "x", "scopes": []}, "empty", "scopes"),
        ({"label": "x", "scopes": "*"}, "not_a_list", "scopes"),
        ({"label": "x", "scopes": ["task:fly"]}, "invalid_input", "scopes"),
        ({"label": "x", "scopes": ["*"], "scoped_teams": [987]}, "invalid_input", "scoped_teams"),
        (
            {"label": "x", "scopes": ["*"], "expires_at": "9999-12-31T23:59:59-01:00"},
            "invalid_input",
            "expires_at",
        ),
        (
            {"label": "x", "scopes": ["*"], "scoped_organizations": [str(uuid4())]},
            "invalid_input",
            "scoped_organizations",
        ),
    ],
)
async def test_refused_keys(yard: Yard, body: dict[str, Any], code: str, attr: str) -> None:
    async with open_browser(yard, "ada") as browser:
        error(await browser.call("POST", "/api/personal_api_keys/", json=body), 400, code, attr)


# --- the gate, and integrations -------------------------------------------------------------------------


async def test_everybody_has_access(yard: Yard) -> None:
    api = yard.api("task:read")
    assert ok(await api.get("/api/code/invites/check-access/")) == {"has_access": True}
    for _ in range(2):
        assert ok(await api.post("/api/code/invites/redeem/", {"code": "Any"})) == {"success": True}
    for body, code in (({}, "required"), ({"code": ""}, "blank"), ({"code": "x" * 51}, "max_length")):
        error(await api.post("/api/code/invites/redeem/", body), 400, code, "code")


async def test_integrations(yard: Yard) -> None:
    api = yard.api("task:read")
    path = f"/api/environments/{yard.project}/integrations/"
    assert ok(await api.get(path)) == {"count": 0, "next": None, "previous": None, "results": []}
    for rest in ("7/", "7/github_repos/", "7/github_branches/?repo=a/b"):
        error(await api.get(path + rest), 404, "not_found")
    error(await yard.api("eve").get(path), 403, "permission_denied")
