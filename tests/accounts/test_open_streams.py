"""Streams that are open when their reader loses the permission to read them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from taskyard.accounts import admin
from taskyard.events import stream
from tests.support.browser import open_browser
from tests.support.yard import DEADLINE_S, Yard, ok


async def _remove(yard: Yard) -> None:
    await admin.remove_member(yard.database, "bob@example.org", yard.project)


async def _revoke(yard: Yard) -> None:
    for key in await admin.list_keys(yard.database, "bob@example.org"):
        await admin.revoke_key(yard.database, key["id"])


async def _set_password(yard: Yard) -> None:
    await admin.set_password(yard.database, "bob@example.org", "another password")


@pytest.mark.parametrize(
    ("lose", "by_cookie"), [(_remove, False), (_remove, True), (_revoke, False), (_set_password, True)]
)
async def test_they_end(
    monkeypatch: pytest.MonkeyPatch, yard: Yard, lose: Callable[[Yard], Awaitable[None]], by_cookie: bool
) -> None:
    monkeypatch.setattr(stream, "RECHECK_S", 0.0)
    run = await yard.api().create_run()
    async with open_browser(yard, "bob") as browser:
        headers = {} if by_cookie else {"Authorization": f"Bearer {yard.keys['bob']}"}
        client = browser.client if by_cookie else yard.client
        path = f"/api/projects/{yard.project}/{run.path('stream/')}"
        async with asyncio.timeout(DEADLINE_S), client.stream("GET", path, headers=headers) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            await run.patch(stage="first")
            async for line in lines:
                if '"first"' in line:
                    break
            await lose(yard)
            await run.patch(stage="second")
            assert not [line async for line in lines if '"second"' in line]  # and it has an end


async def test_a_look_at_the_permission_is_no_request(monkeypatch: pytest.MonkeyPatch, yard: Yard) -> None:
    """Rate limits count what a client sends."""
    monkeypatch.setattr(stream, "RECHECK_S", -1.0)
    run = await yard.api().create_run()
    for n in range(3):
        await run.patch(stage=str(n))
    following = asyncio.create_task(yard.api("bob").get(run.path("stream/")))
    await run.patch(stage="last")
    await run.cancel()
    async with asyncio.timeout(DEADLINE_S):
        response = await following
    assert '"cancelled"' in response.text
    row = await yard.database.fetch_one(
        "SELECT sum(minute_count) AS n FROM key_usage u JOIN api_keys k ON k.id = u.key_id WHERE k.user_id = %(bob)s",
        bob=yard.users["bob"],
    )
    assert row is not None
    assert row["n"] == 1
    ok(await yard.api("bob").get(run.path()))
