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


async def preflight(client: httpx.AsyncClient, url: str, method: str, origin: str = PAGE) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "content-type, range",
    }
    return await client.options(url, headers=headers)


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
    assert "access-control-allow-origin" not in other.headers


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
