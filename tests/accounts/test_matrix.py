"""Every route × every credential, from the application's own table: a new endpoint cannot be forgotten."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from taskyard.accounts import admin
from taskyard.accounts.caller import READ_METHODS
from taskyard.app import application
from taskyard.db.engine import Database
from taskyard.openapi.document import OPERATIONS
from taskyard.openapi.operation import PROJECT
from taskyard.settings import Settings
from tests.support.yard import Yard, error, ok

OPEN = {
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/api/schema"),
    ("GET", "/api/docs"),
    ("GET", "/api/docs/{name}"),
    # A signature or a token of its own takes the place of the caller's credential.
    ("GET", "/api/logs/{run_id}"),
    ("GET", "/api/objects/{key}"),
    ("POST", "/api/objects"),
    ("POST", "/api/projects/{project_id}/tasks/{task_id}/runs/{run_id}/event_stream"),
    # How one gets a credential; each checks what it gets.
    ("POST", "/api/login"),
    ("GET", "/login"),
    ("POST", "/login"),
    ("POST", "/logout"),
    ("GET", "/account"),
    ("POST", "/account/revoke"),
    ("GET", "/set-password"),
    ("POST", "/set-password"),
    ("GET", "/oauth/authorize"),
    ("POST", "/oauth/authorize"),
    ("POST", "/oauth/token"),
    ("POST", "/oauth/revoke"),
    ("GET", "/.well-known/oauth-authorization-server"),
}
"""Routes that answer without a credential. Whoever adds one has to add it here, and think."""

SESSION_ONLY = {
    ("GET", "/api/personal_api_keys"),
    ("POST", "/api/personal_api_keys"),
    ("GET", "/api/personal_api_keys/{key_id}"),
    ("DELETE", "/api/personal_api_keys/{key_id}"),
    ("POST", "/api/logout"),
}

FULL = {
    ("POST", "/api/projects/{project_id}/members"),
    ("PATCH", "/api/projects/{project_id}/members/{member}"),
    ("DELETE", "/api/projects/{project_id}/members/{member}"),
}
"""No key that was made for tasks lets people in or out."""

WITHOUT_SCOPE = {("POST", "/api/code/invites/redeem")}
"""Writes outside of projects that any key may do (tasks-api §11)."""

READS_BY_POST = {"summaries", "presign", "download"}
"""The last words of POST paths that `task:read` may call (tasks-api §1.3)."""
WRITES_BY_GET = {"connection_token"}

SOME_ID = "00000000-0000-4000-8000-000000000000"


@dataclass(frozen=True)
class Route:
    method: str
    template: str

    @property
    def in_project(self) -> bool:
        return "{project_id}" in self.template

    @property
    def scope(self) -> str:
        last = self.template.rpartition("/")[2]
        reads = self.method in READ_METHODS
        if (reads and last not in WRITES_BY_GET) or (self.method == "POST" and last in READS_BY_POST):
            return "task:read"
        return "task:write"

    def path(self, project: int) -> str:
        parts = self.template.replace("{project_id}", str(project)).split("/")
        return "/".join(SOME_ID if part.startswith("{") else part for part in parts)


def routes(yard: Yard) -> list[Route]:
    return [
        Route(method, route.path_format)
        for route in application(yard.settings, yard.database).routes
        for handler in getattr(route, "route_handlers", [])
        for method in sorted(handler.http_methods)
        if method not in ("OPTIONS", "HEAD")
    ]


async def call(yard: Yard, route: Route, key: str | None, project: int) -> str:
    """The status and code of an answer, as text."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    options: dict[str, Any] = {} if route.method in READ_METHODS else {"json": {}}
    response = await yard.client.request(route.method, route.path(project), headers=headers, **options)
    code = response.json().get("code") if "json" in response.headers.get("content-type", "") else None
    return f"{response.status_code} {code}"


async def test_every_route_with_every_credential(yard: Yard) -> None:
    revoked = await admin.create_key(yard.database, "ada@example.org", ["*"])
    await admin.revoke_key(yard.database, revoked["id"])
    wrong = []

    async def expect(route: Route, name: str, key: str | None, wanted: str, project: int = 0) -> None:
        got = await call(yard, route, key, project or yard.project)
        if got != wanted:
            wrong.append(f"{route.method} {route.template} with {name}: {got}, not {wanted}")

    guarded = [route for route in routes(yard) if (route.method, route.template) not in OPEN]
    assert len(guarded) > 40
    for route in guarded:
        await expect(route, "no key", None, "401 not_authenticated")
        await expect(route, "a wrong key", "phx_wrong", "401 authentication_failed")
        await expect(route, "a wrong token", "pha_wrong", "401 authentication_failed")
        await expect(route, "a revoked key", revoked["key"], "401 authentication_failed")
        if route.in_project:
            await expect(route, "a key of another project", yard.keys["eve"], "403 permission_denied")
            await expect(
                route, "a key where there is no project", yard.keys["ada"], "404 not_found", 987_654_321
            )
            if route.scope == "task:write":
                await expect(route, "a read key", yard.keys["task:read"], "403 permission_denied")
        if (route.method, route.template) in FULL:
            await expect(route, "a write key", yard.keys["task:write"], "403 permission_denied")
        if (route.method, route.template) in SESSION_ONLY:
            await expect(route, "a key", yard.keys["ada"], "403 permission_denied")
        elif (
            not route.in_project
            and route.method not in READ_METHODS
            and (route.method, route.template) not in WITHOUT_SCOPE
        ):
            await expect(route, "a read key", yard.keys["task:read"], "403 permission_denied")
    assert not wrong, "\n".join(wrong)


async def test_read_key_may_read(yard: Yard) -> None:
    """No route that reads asks for more than `task:read`."""
    wrong = []
    for route in routes(yard):
        if not route.in_project or route.scope != "task:read" or (route.method, route.template) in OPEN:
            continue
        got = await call(yard, route, yard.keys["task:read"], yard.project)
        if got.startswith(("401", "403", "5")):
            wrong.append(f"{route.method} {route.template}: {got}")
    assert not wrong, "\n".join(wrong)


async def test_open_routes_exist(yard: Yard) -> None:
    """The list above names nothing that is gone."""
    there = {(route.method, route.template) for route in routes(yard)}
    assert there >= OPEN | SESSION_ONLY | FULL | WITHOUT_SCOPE


async def test_what_another_project_has_is_not_there(yard: Yard) -> None:
    """Every operation on a thing of the first project, asked for in the second one: 404, and nothing happens."""
    ada, eve = yard.api(), yard.api("eve", yard.other_project)
    await admin.add_member(yard.database, "eve@example.org", yard.other_project, "admin")
    run = await ada.start("Hello", mode="interactive")
    environment = ok(await ada.post("sandbox_environments/", {"name": "e", "private": False}), 201)["id"]
    nightly = {"name": "a", "prompt": "p", "repository": "o/r", "cron_expression": "0 3 * * *"}
    automation = ok(await ada.post("task_automations/", nightly), 201)["id"]
    member = ok(await ada.get("members/"))["results"][0]["id"]
    ids = {"tasks": run.task_id, "runs": run.id, "sandbox_environments": environment}
    ids |= {"task_automations": automation, "members": member}
    before = await _everything(yard)
    tried, wrong = 0, []
    for operation in OPERATIONS:
        parts = operation.path.split("/")
        if not operation.path.startswith(PROJECT) or "{" not in operation.path.removeprefix(PROJECT):
            continue
        if operation.access == "run token":
            continue  # it names one run
        for number in range(4, len(parts)):
            if parts[number].startswith("{"):
                parts[number] = ids[parts[number - 1]]
        path = "/".join(parts).replace("{project_id}", str(yard.other_project))
        body = {} if operation.request is None else {"json": operation.request.example}
        response = await eve.request(operation.method, path, **body)
        tried += 1
        if response.status_code != 404:
            wrong.append(f"{operation.id}: {response.status_code} {response.text[:200]}")
    assert wrong == []
    assert tried > 35
    assert await _everything(yard) == before


async def _everything(yard: Yard) -> dict[str, Any]:
    """The rows of what belongs to projects."""
    found = {}
    for table in (
        "tasks",
        "runs",
        "events",
        "commands",
        "sandbox_environments",
        "task_automations",
        "memberships",
    ):
        rows = await yard.database.fetch("SELECT to_jsonb(t)::text AS row FROM " + table + " t ORDER BY 1")
        found[table] = [row["row"] for row in rows]
    return found


async def test_a_refusal_says_which_scope(yard: Yard) -> None:
    path = f"tasks/{SOME_ID}/runs/{SOME_ID}/connection_token/"
    refused = error(await yard.api("task:read").get(path), 403, "permission_denied")
    assert refused == {
        "type": "authentication_error",
        "code": "permission_denied",
        "detail": "API key missing required scope 'task:write'",
        "attr": None,
    }


async def test_credentials_of_one_request_do_not_leak_into_another(yard: Yard) -> None:
    """Many callers at once each get their own project."""
    wanted = {"ada": yard.project, "bob": yard.project, "eve": yard.other_project}
    names = list(wanted) * 10
    answers = await asyncio.gather(*(yard.api(name).get("/api/users/@me/") for name in names))
    for name, response in zip(names, answers, strict=True):
        body = response.json()
        assert (body["email"], body["team"]["id"]) == (f"{name}@example.org", wanted[name])


def test_application_needs_no_open_database(settings: Settings) -> None:
    """The table of routes can be read without a server."""
    app = application(settings, Database("postgresql://nowhere.invalid/x"))
    assert len(app.routes) > 20
