"""What triggers keep about tasks is the same as what the rows say, also after many changes at once."""

from __future__ import annotations

import asyncio
import random

import psycopg
import pytest

from taskyard.db.engine import Database
from tests.support.yard import Api, Yard, ok

COUNTED = """
SELECT project_id, internal, archived, created_by_id, origin_product, coalesce(latest_status, ''),
    coalesce(repository, ''), count(*) AS n
FROM tasks WHERE deleted_at IS NULL GROUP BY 1, 2, 3, 4, 5, 6, 7
"""
DIFFERENCES = f"""
WITH counted AS ({COUNTED}), plain (a, b, c, d, e, f, n) AS (
    SELECT project_id, internal, archived, created_by_id, origin_product, status, sum(n)
    FROM counted AS c (project_id, internal, archived, created_by_id, origin_product, status, repository, n)
    GROUP BY 1, 2, 3, 4, 5, 6
), tally AS (
    SELECT project_id, internal, archived, created_by_id, origin_product, latest_status, sum(n) AS n
    FROM task_tally GROUP BY 1, 2, 3, 4, 5, 6 HAVING sum(n) <> 0
), by_repository AS (
    SELECT project_id, internal, archived, created_by_id, origin_product, latest_status, repository, sum(n) AS n
    FROM repository_tally GROUP BY 1, 2, 3, 4, 5, 6, 7 HAVING sum(n) <> 0
)
SELECT to_jsonb(w) FROM ((TABLE tally EXCEPT TABLE plain) UNION ALL (TABLE plain EXCEPT TABLE tally)) w
UNION ALL
SELECT to_jsonb(w) FROM (
    (TABLE by_repository EXCEPT TABLE counted) UNION ALL (TABLE counted EXCEPT TABLE by_repository)
) w
"""
WRONG_LATEST = """
SELECT t.id FROM tasks t LEFT JOIN LATERAL (
    SELECT * FROM runs WHERE task_id = t.id ORDER BY created_at DESC, id DESC LIMIT 1
) r ON true
WHERE (t.latest_run_id, t.latest_run_at, t.latest_status) IS DISTINCT FROM (r.id, r.created_at, r.status)
"""


async def check(database: Database) -> None:
    assert await database.fetch(DIFFERENCES) == []
    assert await database.fetch(WRONG_LATEST) == []


async def live(api: Api, seed: int) -> None:
    """One task, changed this way and that."""
    chance = random.Random(seed)
    task = await api.create_task(title=str(seed), repository=chance.choice(["a/b", "a/c", "", None]))
    path = f"tasks/{task['id']}/"
    runs: list[str] = []
    for _ in range(12):
        match chance.randrange(6):
            case 0:
                ok(await api.patch(path, {"repository": chance.choice(["a/b", "a/d", None])}))
            case 1:
                ok(
                    await api.patch(
                        path, {"archived": chance.random() < 0.5, "internal": chance.random() < 0.5}
                    )
                )
            case 2:
                ok(await api.patch(path, {"origin_product": chance.choice(["slack", "user_created"])}))
            case 3:
                both = await asyncio.gather(*(api.post(f"{path}run/") for _ in range(2)))
                runs += [ok(one)["latest_run"]["id"] for one in both]
            case _:
                some = chance.sample(runs, min(len(runs), 3))
                status = chance.choice(["in_progress", "failed", "cancelled", "completed"])
                changed = [api.patch(f"{path}runs/{run}/", {"status": status}) for run in some]
                for response in await asyncio.gather(
                    *changed, api.patch(path, {"repository": chance.choice(["a/x", "a/y"])})
                ):
                    ok(response)
    if chance.random() < 0.3:
        assert (await api.request("DELETE", path)).status_code == 204


async def test_counts_and_latest_runs_stay_exact(yard: Yard) -> None:
    api = yard.api()
    await asyncio.gather(*(live(api, seed) for seed in range(12)))
    await check(yard.database)
    total = await yard.database.fetch_one(
        "SELECT count(*) AS n FROM tasks WHERE deleted_at IS NULL AND NOT internal AND NOT archived"
    )
    assert total is not None
    assert ok(await api.get("tasks/"))["count"] == total["n"]


async def test_folding_changes_nothing(yard: Yard) -> None:
    api = yard.api()
    await asyncio.gather(*(live(api, seed) for seed in range(3)))

    async def fold() -> None:
        for _ in range(20):
            await yard.database.execute("SELECT fold_task_counts()")
            await check(yard.database)

    await asyncio.gather(fold(), fold(), *(live(api, seed) for seed in range(3, 9)))
    await fold()
    left = await yard.database.fetch_one("SELECT count(*) AS n FROM task_count_changes")
    assert left == {"n": 0}


async def test_an_undone_change_is_not_counted(yard: Yard) -> None:
    api = yard.api()
    await api.create_task()
    async with yard.database.connection() as connection:
        await connection.execute("BEGIN")
        await connection.execute("UPDATE tasks SET archived = true")
        await connection.execute("SELECT fold_task_counts()")
        await connection.execute("ROLLBACK")
    await check(yard.database)
    assert ok(await api.get("tasks/"))["count"] == 1


async def test_tasks_and_runs_are_never_really_deleted(yard: Yard) -> None:
    await yard.api().start("x")
    for statement in ("DELETE FROM tasks", "DELETE FROM runs"):
        with pytest.raises(psycopg.errors.RaiseException, match="are kept"):
            await yard.database.execute(statement)
