"""Credentials, scopes and projects (tasks-api §1.3)."""

from __future__ import annotations

import pytest

from taskyard.accounts import admin
from taskyard.accounts.caller import grants
from taskyard.errors import InvalidInputError, NotFoundError
from tests.support.yard import Yard, error, ok


async def test_no_credential(yard: Yard) -> None:
    refused = error(await yard.api(None).get("tasks/"), 401, "not_authenticated")
    assert refused["type"] == "authentication_error"
    for header in ("Basic x", "Bearer"):
        error(await yard.api(None).get("tasks/", headers={"Authorization": header}), 401, "not_authenticated")


async def test_unknown_and_revoked_keys(yard: Yard) -> None:
    error(
        await yard.api(None).get("tasks/", headers={"Authorization": "Bearer phx_no"}),
        401,
        "authentication_failed",
    )
    made = await admin.create_key(yard.database, "ada@example.org", ["*"])
    header = {"Authorization": f"Bearer {made['key']}"}
    assert (await yard.api(None).get("tasks/", headers=header)).status_code == 200
    await admin.revoke_key(yard.database, made["id"])
    error(await yard.api(None).get("tasks/", headers=header), 401, "authentication_failed")


async def test_expired_key(yard: Yard) -> None:
    await yard.database.execute("UPDATE api_keys SET expires_at = now() - interval '1 s'")
    error(await yard.api().get("tasks/"), 401, "authentication_failed")


async def test_key_in_the_query(yard: Yard) -> None:
    response = await yard.api(None).get("tasks/", params={"personal_api_key": yard.keys["ada"]})
    assert response.status_code == 200


async def test_scopes(yard: Yard) -> None:
    reader, writer = yard.api("task:read"), yard.api("task:write")
    task = await writer.create_task()
    assert ok(await writer.get(f"tasks/{task['id']}/"))["id"] == task["id"]
    assert ok(await reader.get(f"tasks/{task['id']}/"))["id"] == task["id"]
    for method, path in (
        ("POST", "tasks/"),
        ("PATCH", f"tasks/{task['id']}/"),
        ("POST", f"tasks/{task['id']}/run/"),
    ):
        refused = error(await reader.request(method, path, json={}), 403, "permission_denied")
        assert refused["detail"] == "API key missing required scope 'task:write'"


@pytest.mark.parametrize(
    ("scopes", "wanted", "granted"),
    [
        ({"*"}, "task:write", True),
        ({"task:write"}, "task:read", True),
        ({"task:read"}, "task:write", False),
        ({"other:write"}, "task:read", False),
        (set(), "task:read", False),
    ],
)
def test_grants(scopes: set[str], wanted: str, granted: bool) -> None:
    assert grants(frozenset(scopes), wanted) is granted


async def test_projects_of_others(yard: Yard) -> None:
    foreign = await yard.api("eve", yard.other_project).create_task()
    error(await yard.api("eve").get("tasks/"), 403, "permission_denied")
    error(await yard.api().get(f"tasks/{foreign['id']}/"), 404, "not_found")
    for project in (987654321, "x", "-1", "99999999999999999999"):
        refused = error(await yard.api(project=project).get("tasks/"), 404, "not_found")
        assert refused["detail"] == "Project not found."


async def test_key_limited_to_a_project(yard: Yard) -> None:
    await admin.add_member(yard.database, "ada@example.org", yard.other_project)
    made = await admin.create_key(yard.database, "ada@example.org", ["*"], [yard.other_project])
    yard.keys["limited"] = made["key"]
    assert (await yard.api("limited", yard.other_project).get("tasks/")).status_code == 200
    error(await yard.api("limited").get("tasks/"), 403, "permission_denied")


async def test_only_hashes_are_stored(yard: Yard) -> None:
    rows = await yard.database.fetch("SELECT * FROM api_keys")
    for key in yard.keys.values():
        assert not any(key in str(row) for row in rows)


async def test_admin_refusals(yard: Yard) -> None:
    database = yard.database
    for call in (
        admin.create_user(database, "ADA@example.org"),
        admin.create_user(database, "nobody"),
        # What a terminal's bytes become that are no UTF-8.
        admin.create_user(database, "\udcff@example.org"),
        admin.create_project(database, "\udcff"),
        admin.add_member(database, "\udcff@example.org", yard.project),
        admin.create_key(database, "ada@example.org", ["*"], label="\udcff"),
        admin.create_project(database, " "),
        admin.add_member(database, "ada@example.org", yard.project, "king"),
        admin.create_key(database, "ada@example.org", []),
        admin.create_key(database, "ada@example.org", ["task:fly"]),
        admin.revoke_key(database, "x"),
    ):
        with pytest.raises(InvalidInputError):
            await call
    for call in (
        admin.add_member(database, "no@example.org", yard.project),
        admin.add_member(database, "ada@example.org", 987),
        admin.create_key(database, "ada@example.org", ["*"], [987]),
        admin.revoke_key(database, "00000000-0000-4000-8000-000000000000"),
    ):
        with pytest.raises(NotFoundError):
            await call


async def test_bootstrap_happens_once(yard: Yard) -> None:
    assert await admin.bootstrap(yard.database) is None
