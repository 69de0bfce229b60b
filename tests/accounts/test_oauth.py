"""OAuth 2: code flow with PKCE for public clients, rotation of refresh tokens (tasks-api §1.3, §12)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
from pydantic import ValidationError

from taskyard.accounts import admin
from taskyard.accounts.oauth_grammar import same_target
from taskyard.db.engine import Database
from taskyard.settings import OAuthClient, OAuthSettings, Settings
from tests.conftest import make_settings
from tests.support.browser import PASSWORD, Browser, field, form_target, open_browser
from tests.support.yard import Json, Yard, error, ok, open_yard

CALLBACK = "http://127.0.0.1:4321/callback"
CLIENTS = {
    "desk": {"name": "Desk <app>", "redirect_uris": ["http://127.0.0.1/callback", "desk-app://done"]},
    "other": {"name": "Other", "redirect_uris": ["https://other.example/cb"]},
}
VERIFIER = secrets.token_urlsafe(48)
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture
async def yard(tmp_path: Path, database_url: str, database: Database) -> AsyncIterator[Yard]:
    """A server that knows two programs."""
    settings = make_settings(tmp_path, database_url, oauth={"clients": CLIENTS})
    async with open_yard(settings, database) as yard:
        yield yard


def request(**changes: str | None) -> str:
    """The address of a consent page."""
    fields: dict[str, str | None] = {
        "response_type": "code",
        "client_id": "desk",
        "redirect_uri": CALLBACK,
        "scope": "task:read task:write",
        "state": "a state",
        "code_challenge": CHALLENGE,
        "code_challenge_method": "S256",
        **changes,
    }
    return "/oauth/authorize?" + urlencode(
        {name: value for name, value in fields.items() if value is not None}
    )


async def consent(
    browser: Browser, address: str, project: str = "", decision: str = "allow"
) -> dict[str, str]:
    """What the client is told after the person decided."""
    page = await browser.get(address)
    assert page.status_code == 200, page.text
    sent = await browser.submit(
        form_target(page.text),
        csrf_token=field(page.text, "csrf_token"),
        project=project,
        decision=decision,
    )
    assert sent.status_code == 303, sent.text
    return told(sent)


def told(response: httpx.Response) -> dict[str, str]:
    location = response.headers["location"]
    assert location.startswith((CALLBACK, "desk-app://done")), location
    return {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}


async def token(yard: Yard, **fields: str) -> httpx.Response:
    return await yard.client.post("/oauth/token", data={"client_id": "desk", **fields})


async def exchange(yard: Yard, code: str, **changes: str) -> httpx.Response:
    fields = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": CALLBACK,
        "code_verifier": VERIFIER,
    }
    return await token(yard, **(fields | changes))


async def tokens(yard: Yard, person: str = "ada", project: str = "", **changes: str | None) -> Json:
    async with open_browser(yard, person) as browser:
        answer = await consent(browser, request(**changes), project)
    return ok(await exchange(yard, answer["code"]))


async def refresh(yard: Yard, refresh_token: str, **changes: str) -> httpx.Response:
    return await token(yard, **({"grant_type": "refresh_token", "refresh_token": refresh_token} | changes))


async def status(yard: Yard, access_token: str, method: str = "GET") -> int:
    headers = {"Authorization": f"Bearer {access_token}"}
    response = await yard.client.request(method, "/api/projects/@current/tasks/", headers=headers)
    return response.status_code


def refused(response: httpx.Response, code: str, status: int = 400) -> Json:
    """A refusal as RFC 6749 §5.2 has it."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body["error"] == code, body
    return dict(body)


async def test_the_whole_way(yard: Yard) -> None:
    """From a browser that is not signed in to a task that was made with the token."""
    await admin.set_password(yard.database, "ada@example.org", PASSWORD)
    async with open_browser(yard) as browser:
        away = await browser.get(request())
        assert away.status_code == 303
        login = await browser.get(away.headers["location"])
        back = await browser.submit(
            "/login", email="ada@example.org", password=PASSWORD, next=field(login.text, "next")
        )
        assert back.headers["location"] == request()
        page = await browser.get(back.headers["location"])
        assert "Desk &lt;app&gt;" in page.text
        assert "ada@example.org" in page.text
        assert "http://127.0.0.1:4321" in page.text
        assert "create and change tasks" in page.text
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        answer = await consent(browser, request())
    assert answer["state"] == "a state"
    response = await exchange(yard, answer["code"])
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["content-type"] == "application/json"
    made = ok(response)
    assert (made["token_type"], made["expires_in"], made["scope"]) == ("Bearer", 3600, "task:read task:write")
    assert made["access_token"].startswith("pha_")
    assert (made["scoped_teams"], made["scoped_organizations"]) == ([], [])
    yard.keys["token"] = made["access_token"]
    task = await yard.api("token").create_task(title="by a program")
    assert task["created_by"]["email"] == "ada@example.org"
    assert ok(await yard.api("token").get("/api/users/@me/"))["email"] == "ada@example.org"


async def test_scopes_are_what_was_asked(yard: Yard) -> None:
    made = await tokens(yard, scope="task:read insight:read openid")
    assert made["scope"] == "task:read"  # what nobody here knows is not granted, and the answer says so
    assert await status(yard, made["access_token"]) == 200
    assert await status(yard, made["access_token"], "POST") == 403
    assert (await tokens(yard, scope=None))["scope"] == "task:read task:write"
    assert (await tokens(yard, scope="*"))["scope"] == "*"


async def test_one_project(yard: Yard) -> None:
    await admin.add_member(yard.database, "ada@example.org", yard.other_project)
    made = await tokens(yard, project=str(yard.other_project), required_access_level="project")
    assert made["scoped_teams"] == [yard.other_project]
    yard.keys["token"] = made["access_token"]
    assert ok(await yard.api("token").get("/api/users/@me/"))["team"]["id"] == yard.other_project
    error(await yard.api("token").get("tasks/"), 403, "permission_denied")
    assert ok(await yard.api("token", yard.other_project).get("tasks/"))["count"] == 0


async def test_only_projects_of_the_person(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        page = await browser.get(request(required_access_level="project"))
        assert "all my projects" not in page.text
        for project in (str(yard.other_project), "", "x"):
            sent = await browser.submit(
                form_target(page.text),
                csrf_token=field(page.text, "csrf_token"),
                project=project,
                decision="allow",
            )
            assert sent.status_code == 400
            assert "Choose one of your projects." in sent.text


async def test_no(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        answer = await consent(browser, request(), decision="deny")
    assert answer == {"error": "access_denied", "state": "a state"}
    assert await yard.database.fetch("SELECT * FROM oauth_grants") == []


async def test_consent_needs_the_page(yard: Yard) -> None:
    """Neither another site nor a stale page can say yes for a person."""
    async with open_browser(yard, "ada") as browser:
        page = await browser.get(request())
        target = form_target(page.text)
        for csrf in ("", "0" * 64):
            sent = await browser.submit(target, csrf_token=csrf, decision="allow")
            assert sent.status_code == 403
        fields = {"csrf_token": field(page.text, "csrf_token"), "decision": "allow"}
        sent = await browser.client.post(target, data=fields, headers={"Origin": "https://evil.example"})
        assert sent.status_code == 403
    async with open_browser(yard) as nobody:
        assert (await nobody.submit(target, **fields)).headers["location"].startswith("/login?next=")
    assert await yard.database.fetch("SELECT * FROM oauth_grants") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": None},
        {"client_id": "nobody"},
        {"redirect_uri": None},
        {"redirect_uri": "https://evil.example/callback"},
        {"redirect_uri": "http://127.0.0.1:4321/callback/../x"},
        {"redirect_uri": "https://other.example/cb"},
        {"redirect_uri": "callback"},
    ],
)
async def test_a_wrong_client_is_not_sent_back(yard: Yard, changes: dict[str, str | None]) -> None:
    async with open_browser(yard, "ada") as browser:
        page = await browser.get(request(**changes))
        assert page.status_code == 400
        assert "location" not in page.headers
        assert "made a wrong request" in page.text
        sent = await browser.submit(request(**changes), decision="allow")
        assert sent.status_code == 400


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_type": "code token"}, "unauthorized_client"),
        ({"response_type": "none"}, "unauthorized_client"),
        ({"response_type": None}, "invalid_request"),
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge": "\0" * 43}, "invalid_request"),
        ({"code_challenge": CHALLENGE + "A"}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"scope": "fly"}, "invalid_scope"),
    ],
)
async def test_a_wrong_request_is_sent_back(yard: Yard, changes: dict[str, str | None], code: str) -> None:
    response = await yard.client.get(request(**changes))
    assert response.status_code == 303
    answer = told(response)
    assert (answer["error"], answer["state"]) == (code, "a state")


async def test_garbage_is_refused(yard: Yard) -> None:
    for query in ("", "%", "client_id=%zz", "client_id=desk&client_id=other", "a=b&a=c&=", "client_id=\xff"):
        response = await yard.client.get(f"/oauth/authorize?{query}")
        assert response.status_code == 400, query


# --- codes ------------------------------------------------------------------------------------------


async def code(yard: Yard, **changes: str | None) -> str:
    async with open_browser(yard, "ada") as browser:
        return (await consent(browser, request(**changes)))["code"]


async def test_a_code_is_bound_to_its_request(yard: Yard) -> None:
    made = await code(yard)
    refused(await exchange(yard, made, code_verifier="x" * 64), "invalid_grant")
    refused(await exchange(yard, made, redirect_uri="http://127.0.0.1:9/callback"), "invalid_request")
    refused(await exchange(yard, made, client_id="other"), "invalid_grant")
    refused(await exchange(yard, made, client_id="nobody"), "invalid_client", 401)
    refused(await exchange(yard, "another"), "invalid_grant")
    refused(await exchange(yard, made, grant_type="password"), "unsupported_grant_type")
    refused(
        await token(yard, grant_type="authorization_code", code=made, redirect_uri=CALLBACK),
        "invalid_request",
    )
    ok(await exchange(yard, made))  # none of these used it up


async def test_a_code_expires(yard: Yard) -> None:
    made = await code(yard)
    await yard.database.execute("UPDATE oauth_codes SET expires_at = now() - interval '1 s'")
    refused(await exchange(yard, made), "invalid_grant")


async def test_a_code_used_twice_revokes_everything(yard: Yard) -> None:
    """RFC 6749 §4.1.2: somebody has read along."""
    made = await code(yard)
    first = ok(await exchange(yard, made))
    assert await status(yard, first["access_token"]) == 200
    refused(await exchange(yard, made), "invalid_grant")
    assert await status(yard, first["access_token"]) == 401
    refused(await refresh(yard, first["refresh_token"]), "invalid_grant")


async def test_one_of_many_gets_the_tokens(yard: Yard) -> None:
    made = await code(yard)
    answers = await asyncio.gather(*(exchange(yard, made) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400, 400]


async def test_another_app_of_the_same_address_uses_a_private_scheme(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        page = await browser.get(request(redirect_uri="desk-app://done"))
        assert "desk-app://done" in page.text
        answer = await consent(browser, request(redirect_uri="desk-app://done"))
    ok(await exchange(yard, answer["code"], redirect_uri="desk-app://done"))


async def test_clients_that_send_json(yard: Yard) -> None:
    body = {
        "grant_type": "authorization_code",
        "code": await code(yard),
        "redirect_uri": CALLBACK,
        "code_verifier": VERIFIER,
        "client_id": "desk",
    }
    ok(await yard.client.post("/oauth/token", json=body))
    surrogate = (
        b'{"grant_type": "authorization_code", "code": "\\ud800", "client_id": "desk", "token": "\\ud800"}'
    )
    for wrong in (b"[1]", b"{", b"\xff", b"[" * 100_000, surrogate):
        headers = {"Content-Type": "application/json"}
        for path in ("/oauth/token", "/oauth/revoke"):
            refused(await yard.client.post(path, content=wrong, headers=headers), "invalid_request")
    refused(await yard.client.post("/oauth/token"), "unsupported_grant_type")


# --- tokens -----------------------------------------------------------------------------------------


async def test_refresh_tokens_rotate(yard: Yard) -> None:
    first = await tokens(yard)
    second = ok(await refresh(yard, first["refresh_token"]))
    assert second["access_token"] != first["access_token"]
    assert second["refresh_token"] != first["refresh_token"]
    assert second["scope"] == first["scope"]
    third = ok(await refresh(yard, second["refresh_token"]))
    assert await status(yard, third["access_token"]) == 200


async def test_a_refresh_token_used_twice_revokes_everything(yard: Yard) -> None:
    first = await tokens(yard)
    second = ok(await refresh(yard, first["refresh_token"]))
    refused(await refresh(yard, first["refresh_token"]), "invalid_grant")
    for made in (first, second):
        assert await status(yard, made["access_token"]) == 401
        refused(await refresh(yard, made["refresh_token"]), "invalid_grant")


async def test_refresh_is_the_clients_own(yard: Yard) -> None:
    first = await tokens(yard)
    refused(await refresh(yard, first["refresh_token"], client_id="other"), "invalid_grant")
    refused(await refresh(yard, first["access_token"]), "invalid_grant")
    refused(await refresh(yard, "phr_no"), "invalid_grant")
    refused(await refresh(yard, first["refresh_token"], scope="*"), "invalid_scope")
    narrow = ok(await refresh(yard, first["refresh_token"], scope="task:read"))
    assert narrow["scope"] == "task:read"
    assert await status(yard, narrow["access_token"], "POST") == 403
    assert ok(await refresh(yard, narrow["refresh_token"]))["scope"] == "task:read task:write"


async def test_tokens_expire(yard: Yard) -> None:
    made = await tokens(yard)
    await yard.database.execute(
        "UPDATE oauth_tokens SET expires_at = now() - interval '1 s' WHERE kind = 'access'"
    )
    headers = {"Authorization": f"Bearer {made['access_token']}"}
    gone = error(await yard.client.get("/api/users/@me/", headers=headers), 401, "authentication_failed")
    assert gone["detail"] == "Invalid access token: unknown, expired or revoked."
    made = ok(await refresh(yard, made["refresh_token"]))
    assert await status(yard, made["access_token"]) == 200
    await yard.database.execute("UPDATE oauth_tokens SET expires_at = now() - interval '1 s'")
    refused(await refresh(yard, made["refresh_token"]), "invalid_grant")


async def test_a_refresh_token_is_no_access_token(yard: Yard) -> None:
    made = await tokens(yard)
    assert await status(yard, made["refresh_token"]) == 401
    disguised = "pha_" + made["refresh_token"].removeprefix("phr_")
    assert await status(yard, disguised) == 401


async def test_revocation(yard: Yard) -> None:
    for name in ("access_token", "refresh_token"):
        made = await tokens(yard)
        body = {"token": made[name], "client_id": "other"}
        assert (await yard.client.post("/oauth/revoke", data=body)).status_code == 200
        assert await status(yard, made["access_token"]) == 200  # not that client's
        body["client_id"] = "desk"
        for _ in range(2):
            assert (await yard.client.post("/oauth/revoke", data=body)).status_code == 200
        assert await status(yard, made["access_token"]) == 401
        refused(await refresh(yard, made["refresh_token"]), "invalid_grant")
    refused(await yard.client.post("/oauth/revoke", data={"client_id": "desk"}), "invalid_request")


async def test_a_person_takes_it_back(yard: Yard) -> None:
    made = await tokens(yard)
    async with open_browser(yard, "bob") as other:
        grant = (await yard.database.fetch("SELECT id FROM oauth_grants"))[0]["id"]
        csrf = field((await other.get("/account")).text, "csrf_token")
        await other.submit("/account/revoke", csrf_token=csrf, grant=str(grant))
        assert await status(yard, made["access_token"]) == 200
    async with open_browser(yard, "ada") as browser:
        page = (await browser.get("/account")).text
        assert "Desk &lt;app&gt;" in page
        assert (await browser.submit("/account/revoke", csrf_token="x", grant=str(grant))).status_code == 403
        sent = await browser.submit("/account/revoke", csrf_token=field(page, "csrf_token"), grant=str(grant))
        assert sent.headers["location"] == "/account"
        assert "Desk &lt;app&gt;" not in (await browser.get("/account")).text
    assert await status(yard, made["access_token"]) == 401


async def test_tokens_are_not_limited_by_rate(tmp_path: Path, database_url: str, database: Database) -> None:
    areas: dict[str, Any] = {"oauth": {"clients": CLIENTS}, "rate_limits": {"per_minute": 2}}
    async with open_yard(make_settings(tmp_path, database_url, **areas), database) as yard:
        made = await tokens(yard)
        assert [await status(yard, made["access_token"]) for _ in range(5)] == [200] * 5


async def test_only_hashes_are_stored(yard: Yard) -> None:
    made = await tokens(yard)
    for row in await yard.database.fetch(
        "SELECT to_jsonb(t)::text AS text FROM oauth_tokens t"
        " UNION ALL SELECT to_jsonb(c)::text FROM oauth_codes c"
        " UNION ALL SELECT to_jsonb(g)::text FROM oauth_grants g"
    ):
        for name in ("access_token", "refresh_token"):
            assert made[name] not in row["text"]


async def test_old_grants_go(yard: Yard) -> None:
    await tokens(yard)
    await yard.database.execute("UPDATE oauth_tokens SET expires_at = now() - interval '1 s'")
    await yard.database.execute("UPDATE oauth_codes SET expires_at = now() - interval '1 s'")
    await tokens(yard)
    assert len(await yard.database.fetch("SELECT * FROM oauth_grants")) == 1


# --- what clients can know ----------------------------------------------------------------------------


async def test_metadata(yard: Yard) -> None:
    found = ok(await yard.client.get("/.well-known/oauth-authorization-server"))
    assert found["issuer"] == yard.url
    assert found["token_endpoint"] == f"{yard.url}/oauth/token"
    assert found["code_challenge_methods_supported"] == ["S256"]
    assert (await yard.client.get(urlsplit(found["authorization_endpoint"]).path)).status_code == 400


@pytest.mark.parametrize(
    ("known", "given", "same"),
    [
        ("https://a.example/cb", "https://a.example/cb", True),
        ("https://a.example/cb", "https://a.example:8443/cb", False),
        ("https://a.example/cb", "https://a.example/cb?x=1", False),
        ("http://127.0.0.1/cb", "http://127.0.0.1:8123/cb", True),
        ("http://127.0.0.1:1/cb", "http://127.0.0.1:2/cb", True),
        ("http://[::1]/cb", "http://[::1]:9/cb", True),
        ("http://localhost:8237/cb", "http://localhost:9999/cb", True),
        ("http://127.0.0.1/cb", "http://localhost/cb", False),
        ("http://127.0.0.1/cb", "https://127.0.0.1/cb", False),
        ("http://127.0.0.1/cb", "http://127.0.0.1:80/cb/x", False),
        ("http://127.0.0.1/cb", "http://127.0.0.1:80/cb#x", False),
        ("http://127.0.0.1/cb", "http://u@127.0.0.1:80/cb", False),
        ("http://127.0.0.1/cb", "http://127.0.0.1:x/cb", False),
        ("http://127.0.0.1/cb", "http://127.0.0.1.evil.example/cb", False),
        ("http://127.0.0.1/cb", "http://127.0.0.1:1@evil.example/cb", False),
        ("desk-app://done", "desk-app://done", True),
        ("desk-app://done", "desk-app://done/x", False),
    ],
)
def test_redirect_targets(known: str, given: str, same: bool) -> None:
    assert same_target(known, given) is same


@pytest.mark.parametrize(
    "uri",
    ["callback", "http://a.example/cb", "https://a.example/cb#x", "javascript:alert(1)", "data:text/html,x"],
)
def test_settings_refuse_unsafe_targets(uri: str) -> None:
    with pytest.raises(ValidationError):
        OAuthClient(name="x", redirect_uris=[uri])


def test_clients_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"cli": {"name": "CLI", "redirect_uris": ["http://127.0.0.1/cb"]}}'
    monkeypatch.setenv("TASKYARD_OAUTH__CLIENTS", text)
    assert Settings(_env_file=None).oauth == OAuthSettings(
        clients={"cli": OAuthClient(name="CLI", redirect_uris=["http://127.0.0.1/cb"])}
    )
