"""Tasks that are written together: each one gets its own, and one that cannot be written takes no other with it."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg

from taskyard.tasks import store
from taskyard.tasks.inserts import MOST, Inserts
from tests.support.yard import Yard


def fields(title: str) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(store.COLUMNS)
    given = {"title": title, "description": "", "origin_product": "user_created", "title_manually_set": True}
    return empty | given | {"internal": False, "archived": False, "ci_prompt": ""}


async def test_many_at_once(yard: Yard) -> None:
    inserts, count = Inserts(yard.database), 3 * MOST + 5
    rows = await asyncio.gather(
        *(inserts.insert(yard.project, yard.users["ada"], fields(f"Task {n}")) for n in range(count))
    )
    assert [row["title"] for row in rows] == [f"Task {n}" for n in range(count)]
    numbers = [row["task_number"] for row in rows]
    assert numbers == list(range(numbers[0], numbers[0] + count)), "one after another, in the order they came"
    assert await yard.database.fetch_one(
        "SELECT count(*) AS n FROM tasks WHERE project_id = %(p)s", p=yard.project
    ) == {"n": count}


async def test_one_that_cannot_be_written(yard: Yard) -> None:
    inserts = Inserts(yard.database)
    titles = ["first", *(f"b{n}" for n in range(10)), "bad\0", *(f"c{n}" for n in range(10))]
    results = await asyncio.gather(
        *(inserts.insert(yard.project, yard.users["ada"], fields(title)) for title in titles),
        return_exceptions=True,
    )
    failed = [title for title, result in zip(titles, results, strict=True) if isinstance(result, Exception)]
    assert failed == ["bad\0"]
    assert isinstance(results[titles.index("bad\0")], psycopg.DataError)
    rows = await yard.database.fetch("SELECT title FROM tasks WHERE project_id = %(p)s", p=yard.project)
    assert {row["title"] for row in rows} == set(titles) - {"bad\0"}


async def test_a_request_that_gives_up_holds_up_nobody(yard: Yard) -> None:
    inserts = Inserts(yard.database)
    tasks = [
        asyncio.create_task(inserts.insert(yard.project, yard.users["ada"], fields(str(n)))) for n in range(6)
    ]
    await asyncio.sleep(0)
    tasks[1].cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(one, BaseException) for one in done] == [False, True, False, False, False, False]
