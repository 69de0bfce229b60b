"""Real answers of every operation, held against the description: every key, no other, right types."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit
from uuid import uuid4

import httpx
import pytest

from taskyard.db.engine import Database
from taskyard.openapi.document import OPERATIONS
from tests.conftest import make_settings
from tests.openapi.checker import Checker
from tests.support.browser import field, form_target, open_browser
from tests.support.yard import Api, Yard, ok, open_yard

NEVER = {
    "integrations_retrieve",
    "integrations_github_repos_retrieve",
    "integrations_github_branches_retrieve",
}
"""There are no integrations, so nothing succeeds."""
CALLBACK = "http://127.0.0.1:4321/callback"
CLIENTS = {"desk": {"name": "Desk", "redirect_uris": ["http://127.0.0.1/callback"]}}


@pytest.fixture
async def yard(tmp_path: Path, database_url: str, database: Database) -> AsyncIterator[Yard]:
    """A server that knows an OAuth client."""
    async with open_yard(make_settings(tmp_path, database_url, oauth={"clients": CLIENTS}), database) as yard:
        yield yard


@pytest.fixture
def checker(yard: Yard) -> Checker:
    checker = Checker()
    yard.client.event_hooks["response"].append(checker)
    return checker


async def test_every_operation_answers_as_described(yard: Yard, checker: Checker) -> None:
    api = yard.api()
    await tasks(api)
    await runs(api)
    await artifacts(api)
    await environments(api)
    await people(yard, checker)
    await server(yard)

    assert {operation.id for operation in OPERATIONS} - checker.seen == NEVER


async def test_refusals_are_as_described(yard: Yard, checker: Checker) -> None:
    api, run = yard.api(), await yard.api().start()
    local = ok(await api.post(f"tasks/{run.task_id}/runs/"), 201)
    refused = [
        await yard.api(None).get("tasks/"),
        await yard.api("task:read").post("tasks/", {}),
        await yard.api("eve").get("tasks/"),
        await api.get(f"tasks/{uuid4()}/"),
        await api.get("tasks/not-an-id/"),
        await api.get("tasks/", params={"status": "lost"}),
        await api.post("tasks/", {"title": "x" * 256}),
        await api.post("tasks/", headers={"Content-Type": "text/plain"}, content=b"hello"),
        await api.post("tasks/", headers={"Idempotency-Key": "é".encode()}),
        await api.post(f"tasks/{run.task_id}/run/", {"resume_from_run_id": str(uuid4())}),
        await api.post(f"tasks/{run.task_id}/run/", {"pending_user_artifact_ids": ["x"]}),
        await api.post(run.path("command/"), {"jsonrpc": "2.0", "method": "cancel"}),
        await api.post(run.path("resume_in_cloud/")),
        await api.post(f"tasks/{run.task_id}/runs/{local['id']}/start/"),
        await api.post(run.path("artifacts/presign/"), {"storage_path": "nowhere"}),
        await api.post(run.path("artifacts/download/"), {"storage_path": "nowhere"}),
        await api.post(run.path("event_stream/")),
        await api.get(run.path("session_logs/"), params={"limit": "0"}),
        await api.get(f"/api/logs/{run.id}", params={"expires": "1", "signature": "x"}),
        await api.get("/api/objects/nothing", params={"expires": "1", "signature": "x"}),
        await yard.api(None).post("/api/login", {"email": "ada@example.org", "password": "wrong"}),
        await yard.api(None).post("/oauth/token", {"grant_type": "password"}),
        await api.get("/api/personal_api_keys/"),
    ]

    assert [response.status_code for response in refused if response.is_success] == []


async def tasks(api: Api) -> None:
    task = await api.create_task(title="One", repository="acme/shop", json_schema={"type": "object"})
    one = f"tasks/{task['id']}/"
    for _ in range(2):
        await api.post("tasks/", {"title": "Once"}, headers={"Idempotency-Key": "once"})
    ok(await api.post(one + "run/", {"mode": "interactive"}))
    assert ok(await api.get("tasks/", params={"limit": "1"}))["next"]
    assert ok(await api.get(one))["latest_run"]
    ok(await api.patch(one, {"title": "Two"}))
    ok(await api.request("PUT", one, json={"archived": True}))
    ok(await api.get("tasks/repositories/"))
    ok(await api.post("tasks/summaries/", {"ids": [task["id"]]}))
    assert (await api.post(one + "presence/", {"device_id": "phone"})).status_code == 204
    assert (await api.request("DELETE", one + "presence/")).status_code == 204
    assert (await api.request("DELETE", one)).status_code == 204


async def runs(api: Api) -> None:
    run = await api.start("Do it.")
    one = f"tasks/{run.task_id}/"
    made = ok(await api.post(one + "runs/", {"environment": "cloud"}), 201)
    ok(await api.post(f"{one}runs/{made['id']}/start/", {"pending_user_message": "Go."}))
    ok(await api.get(one + "runs/"))
    await run.fetch()
    ok(await api.patch(run.path(), {"stage": "plan", "state": {"model": 7}}))
    ok(await api.patch(run.path("set_output/"), {"output": [1, "two", None]}))
    entry = {"type": "notification", "timestamp": "2026-11-25T10:00:00Z", "notification": {"method": "x"}}
    ok(await api.post(run.path("append_log/"), {"entries": [entry]}))
    assert await run.log()
    assert (await api.get(run.path("session_logs/"))).json()
    log_url = urlsplit((await run.fetch())["log_url"])
    assert (await api.client.get(f"{log_url.path}?{log_url.query}")).status_code == 200
    ok(await api.get(run.path("connection_token/")))
    ok(await api.post(run.path("relay_message/"), {"text": "Done."}))
    audience = {"audience": "posthog:sandbox_event_ingest"}
    token = ok(await api.get(run.path("connection_token/"), params=audience))["token"]
    line = json.dumps({"seq": 1, "event": entry}).encode()
    headers = {"Authorization": f"Bearer {token}"}
    sent = await api.request("POST", run.path("event_stream/"), content=line, headers=headers)
    assert ok(sent)["accepted"] == 1
    late = json.dumps({"seq": 9, "event": entry}).encode()
    sent = await api.request("POST", run.path("event_stream/"), content=late, headers=headers)
    assert sent.status_code == 409
    await api.database.execute("UPDATE runs SET started_at = now() WHERE id = %(run)s", run=run.id)
    assert (await run.command("user_message", content="More."))["result"] == {"queued": True}
    await run.cancel()
    assert await run.stream()
    ok(await api.post(run.path("resume_in_cloud/")))


async def artifacts(api: Api) -> None:
    run = await api.start("With files.")
    item = {"name": "a.txt", "type": "user_attachment", "content": "hello"}
    manifest = ok(await api.post(run.path("artifacts/"), {"artifacts": [item]}))["artifacts"]
    path = {"storage_path": manifest[0]["storage_path"]}
    url = urlsplit(ok(await api.post(run.path("artifacts/presign/"), path))["url"])
    assert (await api.client.get(f"{url.path}?{url.query}")).text == "hello"
    assert (await api.post(run.path("artifacts/download/"), path)).text == "hello"
    for place in (f"tasks/{run.task_id}/staged_artifacts/", run.path("artifacts/")):
        wanted = {"artifacts": [{"name": "b.txt", "type": "user_attachment", "size": 5}]}
        prepared = ok(await api.post(place + "prepare_upload/", wanted))["artifacts"][0]
        form = prepared["presigned_post"]
        files = {"file": ("b.txt", b"hello", "text/plain")}
        sent = await api.client.post(urlsplit(form["url"]).path, data=form["fields"], files=files)
        assert sent.status_code == 204, sent.text
        item = {name: prepared[name] for name in ("id", "name", "type", "storage_path")}
        ok(await api.post(place + "finalize_upload/", {"artifacts": [item]}))
    assert len((await run.fetch())["artifacts"]) == 2


async def environments(api: Api) -> None:
    for path, body, change in (
        ("sandbox_environments/", {"name": "E"}, {"network_access_level": "trusted"}),
        (
            "task_automations/",
            {"name": "A", "prompt": "Do it.", "repository": "acme/shop", "cron_expression": "0 3 * * *"},
            {"enabled": False},
        ),
    ):
        made = ok(await api.post(path, body), 201)
        one = f"{path}{made['id']}/"
        assert ok(await api.get(path))["count"] == 1
        ok(await api.get(one))
        ok(await api.patch(one, change))
        if path == "task_automations/":
            ok(await api.request("PUT", one, json=body))
            ok(await api.post(one + "run/"))
            ok(await api.get(one))
        assert (await api.request("DELETE", one)).status_code == 204
    origin = {"origin": "https://git.example.org/acme/shop.git"}
    ok(await api.post("repositories/", origin), 201)
    ok(await api.post("repositories/", origin), 200)


async def people(yard: Yard, checker: Checker) -> None:
    api = yard.api()
    me = ok(await api.get("/api/users/@me/"))
    for path in ("projects/", f"projects/{yard.project}/", "organizations/", "personal_api_keys/@current/"):
        ok(await api.get(f"/api/{path}"))
    ok(await api.get(f"/api/organizations/{me['organization']['id']}/"))
    ok(await api.get("/api/organizations/@current/members/"))
    ok(await api.patch("/api/users/@me/", {"first_name": "Ada"}))
    member = ok(await api.post("members/", {"email": "new@example.org"}), 201)
    ok(await api.get("members/"))
    ok(await api.get(f"members/{member['id']}/"))
    ok(await api.patch(f"members/{member['id']}/", {"role": "admin"}))
    assert (await api.request("DELETE", f"members/{member['id']}/")).status_code == 400  # the only admin
    ok(await api.patch("members/@me/", {"role": "admin"}))
    assert (await api.request("DELETE", f"members/{member['id']}/")).status_code == 204
    ok(await api.get("/api/code/invites/check-access/"))
    ok(await api.post("/api/code/invites/redeem/", {"code": "WELCOME"}))
    ok(await api.get("/api/environments/@current/integrations/"))
    for path in ("", "github_repos/", "github_branches/"):
        await api.get(f"/api/environments/@current/integrations/{uuid4()}/{path}")
    async with open_browser(yard, "ada") as browser:
        code = await consent(browser)
        browser.client.event_hooks["response"].append(checker)
        keys = "/api/personal_api_keys/"
        made = ok(await browser.call("POST", keys, json={"label": "L", "scopes": ["task:read"]}), 201)
        assert (await browser.get(keys)).status_code == 200
        ok(await browser.get(f"{keys}{made['id']}/"))
        assert (await browser.call("DELETE", f"{keys}{made['id']}/")).status_code == 204
        ok(await browser.sign_in("ada@example.org"))
        ok(await browser.call("POST", "/api/logout"))
    form = {"client_id": "desk", "grant_type": "authorization_code", "redirect_uri": CALLBACK, **code}
    token = ok(await yard.client.post("/oauth/token", data=form))["access_token"]
    ok(await yard.client.post("/oauth/revoke", data={"client_id": "desk", "token": token}))


async def consent(browser: Any) -> dict[str, str]:
    """The code and the verifier that an OAuth client has after a person agreed."""
    verifier = secrets.token_urlsafe(48)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    asked = {
        "response_type": "code",
        "client_id": "desk",
        "redirect_uri": CALLBACK,
        "scope": "task:read",
        "code_challenge": challenge,
        "code_challenge_method": "S256",
    }
    page = await browser.get("/oauth/authorize?" + urlencode(asked))
    sent = await browser.submit(
        form_target(page.text), csrf_token=field(page.text, "csrf_token"), project="", decision="allow"
    )
    query = parse_qs(urlsplit(sent.headers["location"]).query)
    return {"code": query["code"][0], "code_verifier": verifier}


async def server(yard: Yard) -> None:
    api = yard.api(None)
    for path in ("/health", "/ready", "/api/schema/", "/.well-known/oauth-authorization-server"):
        assert (await api.get(path)).status_code == 200


def test_the_checker_notices_what_is_wrong() -> None:
    """A key too many, one too few, a status and a media type that are not described."""
    checker = Checker()
    operation = checker.document["paths"]["/health"]["get"]
    checker.check(operation, httpx.Response(200, json={"status": "ok"}))
    for wrong in (
        httpx.Response(200, json={"status": "ok", "more": 1}),
        httpx.Response(200, json={}),
        httpx.Response(202, json={"status": "ok"}),
        httpx.Response(200, text="ok"),
    ):
        with pytest.raises(AssertionError):
            checker.check(operation, wrong)
