"""Limits of API keys (tasks-api §1.6): exact across processes, told in advance, and only for keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskyard.accounts import admin
from taskyard.accounts import credentials_store as store
from taskyard.accounts.tokens import token_hash
from taskyard.db.engine import Database, open_database
from taskyard.serve import listening
from taskyard.settings import RateLimitSettings, Settings
from tests.conftest import make_settings
from tests.support.browser import open_browser
from tests.support.yard import Yard, error, open_yard


@pytest.fixture
async def strict(tmp_path: Path, database_url: str, database: Database) -> AsyncIterator[Yard]:
    """A server with small limits."""
    limits = RateLimitSettings(per_minute=5, per_hour=8)
    async with open_yard(make_settings(tmp_path, database_url, rate_limits=limits), database) as yard:
        yield yard


def test_defaults_are_those_of_the_contract(settings: Settings) -> None:
    assert (settings.rate_limits.per_minute, settings.rate_limits.per_hour) == (480, 4800)


async def test_burst(strict: Yard) -> None:
    api = strict.api()
    for _ in range(5):
        assert (await api.get("tasks/")).status_code == 200
    refused = await api.get("tasks/")
    body = error(refused, 429, "throttled")
    wait = int(refused.headers["retry-after"])
    assert 50 < wait <= 60
    assert body["type"] == "throttled_error"
    assert body["detail"] == f"Request was throttled. Expected available in {wait} seconds."
    # The whole API shares the count; another key of the same user has its own.
    error(await api.get("/api/users/@me/"), 429, "throttled")
    assert (await strict.api("task:read").get("tasks/")).status_code == 200


async def test_the_window_ends(strict: Yard) -> None:
    api = strict.api()
    for _ in range(6):
        last = await api.get("tasks/")
    assert last.status_code == 429
    await strict.database.execute("UPDATE key_usage SET minute_start = minute_start - interval '1 minute'")
    assert (await api.get("tasks/")).status_code == 200


async def test_sustained(strict: Yard) -> None:
    """Eight in the hour; what was refused by the minute does not count."""
    api, statuses = strict.api(), []
    for _ in range(2):
        statuses += [(await api.get("tasks/")).status_code for _ in range(6)]
        await strict.database.execute(
            "UPDATE key_usage SET minute_start = minute_start - interval '1 minute'"
        )
    assert statuses == [200] * 5 + [429] + [200] * 3 + [429] * 3
    refused = await api.get("tasks/")
    assert refused.status_code == 429
    assert 3400 < int(refused.headers["retry-after"]) <= 3600


async def test_exact_across_processes(strict: Yard) -> None:
    """Two servers on one database, many requests at once: exactly five get through."""
    async with (
        open_database(strict.settings, max_connections=4) as second,
        listening(strict.settings, second, "127.0.0.1", 0) as url,
    ):
        urls = [strict.url, url] * 10
        headers = {"Authorization": f"Bearer {strict.keys['ada']}"}
        answers = await asyncio.gather(
            *(strict.client.get(f"{base}/api/users/@me/", headers=headers) for base in urls)
        )
    assert sorted(response.status_code for response in answers) == [200] * 5 + [429] * 15


async def test_refused_keys_are_not_counted(strict: Yard) -> None:
    for _ in range(10):
        error(
            await strict.api(None).get("tasks/", headers={"Authorization": "Bearer phx_no"}),
            401,
            "authentication_failed",
        )
    assert await strict.database.fetch("SELECT * FROM key_usage") == []


async def test_sessions_are_not_limited(strict: Yard) -> None:
    async with open_browser(strict, "ada") as browser:
        for _ in range(10):
            assert (await browser.get("/api/users/@me/")).status_code == 200


async def test_switched_off(tmp_path: Path, database_url: str, database: Database) -> None:
    limits = RateLimitSettings(enabled=False, per_minute=1)
    async with open_yard(make_settings(tmp_path, database_url, rate_limits=limits), database) as yard:
        for _ in range(3):
            assert (await yard.api().get("tasks/")).status_code == 200
    assert await database.fetch("SELECT * FROM key_usage") == []


async def test_many_connections_count_exactly(yard: Yard) -> None:
    made = await admin.create_key(yard.database, "ada@example.org", ["*"])

    async def once() -> bool:
        row = await store.count_key(yard.database, token_hash(made["key"]), None, 30, 1000)
        assert row is not None
        return row["counted"] is not None

    assert sum(await asyncio.gather(*(once() for _ in range(80)))) == 30
