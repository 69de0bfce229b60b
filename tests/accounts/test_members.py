"""Who belongs to a project: list, add, change, remove; and switching between projects."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from taskyard.accounts import admin, members_store
from tests.support.browser import open_browser
from tests.support.yard import Api, Yard, error, eventually, ok

KEYS = {"id", "user", "role", "level", "joined_at", "updated_at"}


@pytest.fixture
async def boss(yard: Yard) -> Api:
    """bob, who is an admin of the project and not of the site."""
    await admin.add_member(yard.database, "bob@example.org", yard.project, "admin")
    return yard.api("bob")


async def people(api: Api) -> dict[str, str]:
    """Addresses and roles."""
    listed = ok(await api.get("members/"))
    assert listed["count"] == len(listed["results"])
    return {entry["user"]["email"]: entry["role"] for entry in listed["results"]}


async def uuid_of(api: Api, name: str) -> str:
    found = ok(await api.get("members/"))["results"]
    return str(next(entry["id"] for entry in found if entry["user"]["email"] == f"{name}@example.org"))


async def join(yard: Yard, name: str, role: str = "member", scopes: tuple[str, ...] = ("*",)) -> Api:
    """Another person of the project."""
    email = f"{name}@example.org"
    await admin.create_user(yard.database, email)
    await admin.add_member(yard.database, email, yard.project, role)
    yard.keys[name] = (await admin.create_key(yard.database, email, scopes))["key"]
    return yard.api(name)


async def test_list_and_get(yard: Yard, boss: Api) -> None:
    listed = ok(await yard.api("task:read").get("members/"))
    assert [set(entry) for entry in listed["results"]] == [KEYS, KEYS]
    assert [(entry["user"]["email"], entry["level"]) for entry in listed["results"]] == [
        ("ada@example.org", 1),
        ("bob@example.org", 8),
    ]
    me = ok(await boss.get("members/@me/"))
    assert me == ok(await boss.get(f"members/{me['id']}/")) == listed["results"][1]
    assert me["user"]["id"] == yard.users["bob"]
    assert ok(await boss.get("members/?limit=1"))["next"].endswith("limit=1&offset=1")
    for wrong in (str(uuid4()), "x"):
        error(await boss.get(f"members/{wrong}/"), 404, "not_found")
    error(await yard.api("eve").get("members/"), 403, "permission_denied")


async def test_add_somebody_who_has_an_account(yard: Yard, boss: Api) -> None:
    made = ok(await boss.post("members/", {"email": "Eve@example.org", "role": "admin"}), 201)
    assert (made["user"]["email"], made["role"]) == ("eve@example.org", "admin")
    assert "password_path" not in made, "that would be the key to her account"
    assert ok(await yard.api("eve").get("tasks/"))["count"] == 0
    error(await boss.post("members/", {"email": "eve@example.org"}), 400, "unique", "email")
    assert (await people(boss))["eve@example.org"] == "admin"


async def test_add_somebody_new(yard: Yard, boss: Api) -> None:
    made = ok(await boss.post("members/", {"email": "new@example.org", "first_name": "Nia"}), 201)
    assert (made["user"]["first_name"], made["role"]) == ("Nia", "member")
    async with open_browser(yard) as browser:
        page = await browser.get(made["password_path"])
        assert (page.status_code, "new@example.org" in page.text) == (200, True)
        token = made["password_path"].partition("token=")[2]
        assert (
            await browser.submit("/set-password", token=token, password="a long enough one")
        ).status_code == 303
        assert ok(await browser.get("/api/users/@me/"))["team"]["id"] == yard.project


@pytest.mark.parametrize(
    ("body", "code", "attr"),
    [
        ({}, "required", "email"),
        ({"email": "nobody"}, "invalid_input", "email"),
        ({"email": "a@b", "role": "king"}, "invalid_choice", "role"),
        ({"email": "x" * 250 + "@example.org"}, "max_length", "email"),
    ],
)
async def test_refused_additions(boss: Api, body: Any, code: str, attr: str) -> None:
    error(await boss.post("members/", body), 400, code, attr)


async def test_only_admins_manage(yard: Yard) -> None:
    """And whoever administers the site, as ada does."""
    cid, dan = await join(yard, "cid"), await join(yard, "dan")
    one = f"members/{await uuid_of(dan, 'bob')}/"
    for response in (
        await cid.post("members/", {"email": "x@example.org"}),
        await cid.patch(one, {"role": "admin"}),
        await cid.patch("members/@me/", {"role": "admin"}),
        await cid.request("DELETE", one),
    ):
        assert (
            error(response, 403, "permission_denied")["detail"] == "Only admins of the project may do this."
        )
    assert ok(await yard.api().patch(one, {"role": "admin"}))["level"] == 8


async def test_keys_for_tasks_do_not_manage(yard: Yard) -> None:
    boss = await join(yard, "cid", "admin", ("task:write",))
    for response in (
        await boss.post("members/", {"email": "x@example.org"}),
        await boss.patch("members/@me/", {"role": "member"}),
        await boss.request("DELETE", "members/@me/"),
    ):
        refused = error(response, 403, "permission_denied")
        assert refused["detail"] == "API key missing required scope '*'"


async def test_change_a_role(boss: Api) -> None:
    one = f"members/{await uuid_of(boss, 'ada')}/"
    before = ok(await boss.get(one))
    after = ok(await boss.patch(one, {"role": "admin"}))
    assert (after["role"], after["joined_at"]) == ("admin", before["joined_at"])
    assert after["updated_at"] > before["updated_at"]
    assert ok(await boss.patch(one, {})) == after
    error(await boss.patch(one, {"role": None}), 400, "null", "role")
    assert ok(await boss.patch(one, {"role": "member"}))["level"] == 1


async def test_the_last_admin_stays(boss: Api) -> None:
    for response in (
        await boss.patch("members/@me/", {"role": "member"}),
        await boss.request("DELETE", "members/@me/"),
    ):
        error(response, 400, "last_admin")
    assert ok(await boss.patch("members/@me/", {"role": "admin"}))["role"] == "admin"
    assert (await people(boss))["bob@example.org"] == "admin"


async def test_admins_who_leave_at_once(yard: Yard, boss: Api) -> None:
    """One of them has to stay."""
    admins = [boss, *[await join(yard, f"admin{n}", "admin") for n in range(5)]]
    answers = await asyncio.gather(*(api.request("DELETE", "members/@me/") for api in admins))
    assert sorted(answer.status_code for answer in answers) == [204] * 5 + [400]
    assert list((await people(yard.api())).values()).count("admin") == 1


@pytest.mark.parametrize("method", ["PATCH", "POST"])
async def test_who_is_no_admin_any_more_when_it_is_their_turn(yard: Yard, boss: Api, method: str) -> None:
    """A request that came before, and waited for the one that took the role away."""
    mal = await join(yard, "mal", "admin")
    path, body = {
        "PATCH": ("members/@me/", {"role": "admin"}),
        "POST": ("members/", {"email": "eve@example.org", "role": "admin"}),
    }[method]
    async with yard.database.transaction() as connection:
        await members_store.lock(connection, yard.project)
        waiting = asyncio.create_task(mal.request(method, path, json=body))
        await eventually(
            lambda: yard.database.fetch(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            ),
            bool,
            lambda _: "request that waits",
        )
        await connection.execute(
            "UPDATE memberships m SET role = 'member' FROM users u"
            " WHERE u.id = m.user_id AND u.email = 'mal@example.org'"
        )
    error(await waiting, 403, "permission_denied")
    assert await people(boss) == {
        "ada@example.org": "member", "bob@example.org": "admin", "mal@example.org": "member",
    }  # fmt: skip


async def test_remove(yard: Yard, boss: Api) -> None:
    cid = await join(yard, "cid")
    task = await cid.create_task(title="mine")
    one = f"members/{await uuid_of(boss, 'cid')}/"
    assert (await boss.request("DELETE", one)).status_code == 204
    error(await boss.request("DELETE", one), 404, "not_found")
    error(await cid.get("tasks/"), 403, "permission_denied")
    assert ok(await boss.get(f"tasks/{task['id']}/"))["created_by"]["email"] == "cid@example.org"
    assert ok(await cid.get("/api/users/@me/"))["team"] is None
    error(await cid.get("/api/projects/@current/"), 404, "not_found")


async def test_whoever_leaves_goes_on_in_another_project(yard: Yard) -> None:
    await admin.add_member(yard.database, "eve@example.org", yard.project)
    await admin.add_member(yard.database, "ada@example.org", yard.other_project)
    eve = yard.api("eve", yard.other_project)
    assert (await eve.request("DELETE", "members/@me/")).status_code == 204
    assert ok(await eve.get("/api/users/@me/"))["team"]["id"] == yard.project


async def test_people_of_an_organization(yard: Yard, boss: Api) -> None:
    """Those with whom the caller shares a project, each once."""
    await admin.add_member(yard.database, "bob@example.org", yard.other_project)
    me = ok(await boss.get("/api/users/@me/"))
    path = f"/api/organizations/{me['organization']['id']}/members/"
    listed = ok(await boss.get(path))
    found = {entry["user"]["email"]: entry["role"] for entry in listed["results"]}
    assert found == {"ada@example.org": "member", "bob@example.org": "admin", "eve@example.org": "member"}
    assert listed["count"] == 3
    assert ok(await boss.get("/api/organizations/@current/members/")) == {**listed}
    only = {entry["user"]["email"] for entry in ok(await yard.api("eve").get(path))["results"]}
    assert only == {"bob@example.org", "eve@example.org"}
    error(await boss.get(f"/api/organizations/{uuid4()}/members/"), 404, "not_found")


# --- oneself --------------------------------------------------------------------------------------------


async def test_switch_the_project(yard: Yard) -> None:
    await admin.add_member(yard.database, "ada@example.org", yard.other_project)
    api = yard.api("task:write", "@current")
    assert ok(await api.get(""))["id"] == yard.project
    me = ok(await api.patch("/api/users/@me/", {"set_current_team": yard.other_project}))
    assert me["team"]["id"] == yard.other_project
    assert ok(await api.get("")) == me["team"]
    error(
        await api.patch("/api/users/@me/", {"set_current_team": 987654}),
        400,
        "does_not_exist",
        "set_current_team",
    )
    error(
        await api.patch("/api/users/@me/", {"set_current_team": "x"}),
        400,
        "invalid_input",
        "set_current_team",
    )
    assert ok(await api.get(""))["id"] == yard.other_project


async def test_switch_the_organization(yard: Yard) -> None:
    row = await yard.database.fetch_one(
        "WITH o AS (INSERT INTO organizations (name) VALUES ('Elsewhere') RETURNING id)"
        " INSERT INTO projects (organization_id, name) SELECT id, 'p' FROM o RETURNING id, organization_id"
    )
    assert row is not None
    there = {"set_current_organization": str(row["organization_id"])}
    api = yard.api()
    error(await api.patch("/api/users/@me/", there), 400, "does_not_exist", "set_current_organization")
    await admin.add_member(yard.database, "ada@example.org", row["id"])
    assert ok(await api.patch("/api/users/@me/", there))["team"]["id"] == row["id"]
    # Already there: whichever project of it is the current one stays it.
    home = ok(await api.get(f"/api/projects/{yard.project}/"))["organization"]
    await admin.add_member(yard.database, "ada@example.org", yard.other_project)
    ok(await api.patch("/api/users/@me/", {"set_current_team": yard.other_project}))
    assert (
        ok(await api.patch("/api/users/@me/", {"set_current_organization": home}))["team"]["id"]
        == yard.other_project
    )


async def test_a_limited_key_switches_among_its_projects(yard: Yard) -> None:
    await admin.add_member(yard.database, "ada@example.org", yard.other_project)
    key = (await admin.create_key(yard.database, "ada@example.org", ["*"], [yard.project]))["key"]
    yard.keys["limited"] = key
    refused = await yard.api("limited").patch("/api/users/@me/", {"set_current_team": yard.other_project})
    error(refused, 400, "does_not_exist", "set_current_team")


async def test_change_ones_name(yard: Yard) -> None:
    changed = ok(
        await yard.api().patch("/api/users/@me/", {"first_name": " Ada ", "email": "x@y", "is_staff": False})
    )
    assert (changed["first_name"], changed["last_name"], changed["email"], changed["is_staff"]) == (
        "Ada",
        "",
        "ada@example.org",
        True,
    )
    assert ok(await yard.api().patch("/api/users/@me/", {"last_name": "L"}))["first_name"] == "Ada"
    error(
        await yard.api().patch("/api/users/@me/", {"first_name": "x" * 151}), 400, "max_length", "first_name"
    )
    error(await yard.api().patch("/api/users/@me/", {"first_name": None}), 400, "null", "first_name")
    error(await yard.api("task:read").patch("/api/users/@me/", {"last_name": "x"}), 403, "permission_denied")


async def test_a_browser_needs_its_csrf_token(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        sent = {"last_name": "L"}
        error(await browser.call("PATCH", "/api/users/@me/", csrf=False, json=sent), 403, "permission_denied")
        assert ok(await browser.call("PATCH", "/api/users/@me/", json=sent))["last_name"] == "L"
