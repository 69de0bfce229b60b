"""Web pages of other origins, and the store behind the whole server."""

from __future__ import annotations

import httpx

from taskyard.db.engine import Database
from taskyard.objects.interface import Form
from taskyard.objects.service import open_store
from taskyard.settings import ObjectSettings, Settings
from tests.support.yard import Yard, ok, open_yard

PAGE = "https://app.example.org"


async def form_of(yard: Yard) -> tuple[str, Form]:
    task = await yard.api().create_task(title="t")
    item = {"name": "a.txt", "type": "user_attachment", "size": 3}
    sent = await yard.api().post(
        f"tasks/{task['id']}/staged_artifacts/prepare_upload/", {"artifacts": [item]}
    )
    entry = ok(sent)["artifacts"][0]
    return entry["storage_path"], Form(**entry["presigned_post"])


async def preflight(
    client: httpx.AsyncClient, url: str, method: str, origin: str = PAGE, headers: str = "content-type, range"
) -> httpx.Response:
    sent = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": headers,
    }
    return await client.options(url, headers=sent)


async def test_pages_upload_and_download(yard: Yard) -> None:
    key, form = await form_of(yard)
    asked = await preflight(yard.client, form.url, "POST")
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "*"
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["access-control-allow-headers"] == "content-type, range"
    assert "access-control-allow-credentials" not in asked.headers
    sent = await yard.client.post(
        form.url, data=form.fields, files={"file": ("a", b"abc")}, headers={"Origin": PAGE}
    )
    assert sent.status_code == 204
    assert sent.headers["access-control-allow-origin"] == "*"
    store = await open_store(yard.settings, yard.database)
    url = store.download_url(yard.url, key)
    assert (await preflight(yard.client, url, "GET")).status_code == 200
    got = await yard.client.get(url, headers={"Origin": PAGE})
    assert (got.status_code, got.content) == (200, b"abc")
    assert "Content-Range" in got.headers["access-control-expose-headers"]
    head = await yard.client.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "3")
    assert "access-control-allow-origin" not in head.headers


async def test_refusals_can_be_read_by_pages(yard: Yard) -> None:
    refused = await yard.client.get(f"{yard.url}/api/objects/none", headers={"Origin": PAGE})
    assert refused.status_code == 403
    assert refused.headers["access-control-allow-origin"] == "*"
    assert refused.headers["content-type"].startswith("application/xml")


async def test_logs_but_nothing_else_of_the_api(yard: Yard) -> None:
    run = await yard.api().start("Hello")
    log_url = (await run.fetch())["log_url"]
    assert (await preflight(yard.client, log_url, "GET")).headers["access-control-allow-origin"] == "*"
    got = await yard.client.get(log_url, headers={"Origin": PAGE})
    assert got.headers["access-control-allow-origin"] == "*"
    other = await yard.api().get("tasks/", headers={"Origin": PAGE})
    assert other.status_code == 200
    assert not [name for name in other.headers if name.startswith("access-control")]
    asked = await preflight(yard.client, f"/api/projects/{yard.project}/tasks/", "POST")
    assert not [name for name in asked.headers if name.startswith("access-control")]


async def test_the_api_when_it_is_allowed(settings: Settings, database: Database) -> None:
    own = settings.model_copy(update={"cors_origins": [PAGE]})
    async with open_yard(own, database) as yard:
        path = f"/api/projects/{yard.project}/tasks/"
        for method in ("GET", "POST", "PATCH", "DELETE"):
            asked = await preflight(yard.client, path, method, headers="authorization, content-type")
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == PAGE
            assert method in asked.headers["access-control-allow-methods"]
            assert asked.headers["access-control-allow-headers"] == "authorization, content-type"
        made = await yard.api().post("tasks/", {"title": "x"}, headers={"Origin": PAGE})
        refused = await yard.api(None).get("tasks/", headers={"Origin": PAGE})
        for answer, status in ((made, 201), (refused, 401)):
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert answer.headers["vary"] == "Origin"
            assert "Retry-After" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers
        other = await yard.api().get("tasks/", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        # Pages for people are no part of it, nor do links follow its rule.
        page = await yard.client.get("/login", headers={"Origin": PAGE})
        assert "access-control-allow-origin" not in page.headers
        link = await yard.client.get("/api/objects/none", headers={"Origin": "https://evil.example"})
        assert link.headers["access-control-allow-origin"] == "*"


async def test_named_origins_only(settings: Settings, database: Database) -> None:
    own = settings.model_copy(update={"objects": ObjectSettings(cors_origins=[PAGE])})
    async with open_yard(own, database) as yard:
        url = f"{yard.url}/api/objects"
        assert (await preflight(yard.client, url, "POST")).headers["access-control-allow-origin"] == PAGE
        other = await preflight(yard.client, url, "POST", "https://other.example.org")
        assert "access-control-allow-origin" not in other.headers
        assert other.headers["vary"] == "Origin"


async def test_processes_of_a_site_share_the_key(yard: Yard) -> None:
    """A form of one process is good for every other one."""
    one, other = [await open_store(yard.settings, yard.database) for _ in range(2)]
    fields = one.upload_form(yard.url, "k", 10).fields
    response = await yard.client.post(f"{yard.url}/api/objects", data=fields, files={"file": ("f", b"x")})
    assert response.status_code == 204
    assert await other.head("k") is not None
