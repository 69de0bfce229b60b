"""What the retention job removes, and what it never does (tasks-api §8)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from taskyard.artifacts import retention, store
from taskyard.db.engine import Database
from taskyard.objects.interface import ObjectStore, StorageError
from taskyard.objects.service import open_store
from taskyard.settings import Settings
from tests.support.artifacts import OfRun, Staged, item, send
from tests.support.yard import Run, Yard, eventually, ok, open_yard


@pytest.fixture
async def objects(yard: Yard) -> ObjectStore:
    return await open_store(yard.settings, yard.database)


async def staged(yard: Yard) -> Staged:
    return Staged(yard.api(), (await yard.api().create_task(title="A task"))["id"])


async def later(yard: Yard, **ago: int) -> None:
    """Let so much time pass for everything that is stored."""
    changes: list[Any] = [
        "UPDATE stored_objects SET keep_until = keep_until - make_interval(days => %(days)s, hours => %(hours)s)",
        "UPDATE staged_artifacts SET expires_at = expires_at - make_interval(days => %(days)s, hours => %(hours)s)",
        "UPDATE runs SET updated_at = updated_at - make_interval(days => %(days)s, hours => %(hours)s)",
    ]
    for change in changes:
        await yard.database.execute(change, **{"days": 0, "hours": 0, **ago})


async def there(objects: ObjectStore, *entries: Any) -> list[bool]:
    return [await objects.head(entry["storage_path"]) is not None for entry in entries]


async def test_unused_uploads_go_after_a_day(yard: Yard, objects: ObjectStore) -> None:
    task = await staged(yard)
    prepared = (await task.prepare(item()))[0]
    await send(task.api, prepared)
    waiting = await task.add()
    await later(yard, hours=23)
    assert await retention.sweep(yard.database, objects) == 0
    assert await there(objects, prepared, waiting) == [True, True]
    await later(yard, hours=2)
    assert await retention.sweep(yard.database, objects) == 2
    assert await there(objects, prepared, waiting) == [False, False]
    assert await yard.database.fetch("SELECT 1 FROM stored_objects") == []
    assert await yard.database.fetch("SELECT 1 FROM staged_artifacts") == []
    response = await task.call(
        "finalize", {**item(), "id": waiting["id"], "storage_path": waiting["storage_path"]}
    )
    assert response.json() == {"error": "Artifact upload not found in object storage"}


async def test_finalizing_again_begins_the_day_anew(yard: Yard, objects: ObjectStore) -> None:
    task = await staged(yard)
    entry = await task.add()
    await later(yard, hours=23)
    await task.finalize(entry)
    await later(yard, hours=23)
    assert await retention.sweep(yard.database, objects) == 0
    assert ok(await task.run(entry["id"]))["latest_run"]["artifacts"][0]["id"] == entry["id"]


async def test_artifacts_of_runs_are_kept_for_30_days(yard: Yard, objects: ObjectStore) -> None:
    task = await staged(yard)
    attached = await task.add()
    run = Run(task.api, task.task_id, ok(await task.run(attached["id"]))["latest_run"]["id"])
    inline = await OfRun(run).add()
    prepared = (await OfRun(run).prepare(item()))[0]
    await send(task.api, prepared)
    finalized = (await OfRun(run).finalize(prepared))[0]
    await run.cancel()
    await later(yard, days=29)
    assert await retention.sweep(yard.database, objects) == 0
    await later(yard, days=2)
    assert await retention.sweep(yard.database, objects) == 3
    assert await there(objects, attached, inline, finalized) == [False, False, False]
    response = await OfRun(run).download(inline["storage_path"])
    assert (response.status_code, response.json()) == (404, {"error": "Artifact content not found"})


async def test_what_a_live_task_has_is_kept(yard: Yard, objects: ObjectStore) -> None:
    """A run that is not over, or one changed lately: it may be resumed, and reads what those before it left."""
    api = yard.api()
    task = await api.create_task(title="t")
    first = Run(api, task["id"], ok(await api.post(f"tasks/{task['id']}/runs/", {}), 201)["id"])
    old = await OfRun(first).add()
    unused = (await OfRun(first).prepare(item()))[0]
    await send(api, unused)
    await first.cancel()
    body = {"resume_from_run_id": first.id}
    second = Run(api, task["id"], ok(await api.post(f"tasks/{task['id']}/run/", body))["latest_run"]["id"])
    await later(yard, days=100)
    assert await retention.sweep(yard.database, objects) == 1
    assert await there(objects, old, unused) == [True, False]
    assert (await OfRun(second).download(old["storage_path"])).text == "hello"
    await second.cancel()
    for _ in range(3):
        await later(yard, days=9)
        assert await retention.sweep(yard.database, objects) == 0
    await later(yard, days=9)
    assert await retention.sweep(yard.database, objects) == 1
    assert await there(objects, old) == [False]


async def test_the_checkpoint_of_a_live_task_is_kept(yard: Yard, objects: ObjectStore) -> None:
    """What a run sleeps on, or another goes on from; not the one before it."""
    run = await yard.api().create_run()
    for key in ("checkpoints/old", "checkpoints/new"):
        async with yard.database.transaction() as connection:
            await store.expect(connection, UUID(run.task_id), [key])
        await objects.put(key, b"bundle", "application/octet-stream")
    parts = {"pushed": {"commit": None}, "workspace": {"key": "checkpoints/new", "hash": "h", "head": "c"}}
    await yard.database.execute(
        "INSERT INTO checkpoints (run_id, generation, parts) VALUES (%(run)s, 1, %(parts)s)",
        run=run.id,
        parts=Jsonb(parts),
    )
    old, new = ({"storage_path": f"checkpoints/{name}"} for name in ("old", "new"))
    await later(yard, days=100)
    assert await retention.sweep(yard.database, objects) == 1
    assert await there(objects, old, new) == [False, True]
    await run.cancel()
    await later(yard, days=31)
    assert await retention.sweep(yard.database, objects) == 1
    assert await there(objects, new) == [False]


async def test_many_at_once(yard: Yard, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 3)
    task = await staged(yard)
    kept = await task.add()
    ok(await task.run(kept["id"]))
    await task.prepare(*(item(f"{n}") for n in range(20)))
    await later(yard, days=50)
    counts = await asyncio.gather(*(retention.sweep(yard.database, objects) for _ in range(4)))
    assert sum(counts) == 20
    assert await there(objects, kept) == [True]
    rows = await yard.database.fetch("SELECT key FROM stored_objects")
    assert [row["key"] for row in rows] == [kept["storage_path"]]


async def test_failed_removal_is_done_again(
    yard: Yard, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await staged(yard)
    entry = await task.add()
    await later(yard, days=2)

    async def fail(keys: Sequence[str]) -> None:
        raise StorageError

    with monkeypatch.context() as patch:
        patch.setattr(objects, "delete", fail)
        with pytest.raises(StorageError):
            await retention.sweep(yard.database, objects)
    assert await there(objects, entry) == [True]
    assert await retention.sweep(yard.database, objects) == 1
    assert await there(objects, entry) == [False]


async def test_attaching_and_removing_at_once(
    yard: Yard, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who attaches while the object is being removed is refused; nobody is promised what goes."""
    task = await staged(yard)
    entry = await task.add()
    await yard.database.execute("UPDATE stored_objects SET keep_until = now() - interval '1 hour'")
    await yard.database.execute("UPDATE staged_artifacts SET expires_at = now()")
    removing, go_on = asyncio.Event(), asyncio.Event()
    delete = objects.delete

    async def slow(keys: Sequence[str]) -> None:
        removing.set()
        await go_on.wait()
        await delete(keys)

    monkeypatch.setattr(objects, "delete", slow)
    sweeping = asyncio.create_task(retention.sweep(yard.database, objects))
    async with asyncio.timeout(60):
        await removing.wait()
    # The job has decided; then the entry is found to be valid after all.
    await yard.database.execute("UPDATE staged_artifacts SET expires_at = now() + interval '1 hour'")
    attaching = asyncio.create_task(task.run(entry["id"]))
    await eventually(lambda: waiting(yard.database), bool, lambda _: "run that waits for the row")
    go_on.set()
    assert await sweeping == 1
    response = await attaching
    assert response.status_code == 400
    assert response.json()["missing_artifact_ids"] == [entry["id"]]


async def waiting(database: Database) -> bool:
    """Whether some transaction waits for a lock."""
    rows = await database.fetch(
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(rows)


async def test_held_objects_are_left_alone(yard: Yard, objects: ObjectStore) -> None:
    """The other way round: what somebody is about to attach is not looked at."""
    task = await staged(yard)
    entry = await task.add()
    await later(yard, days=2)
    async with yard.database.transaction() as connection:
        assert await store.hold_attached(connection, [entry["storage_path"]]) == {entry["storage_path"]}
        assert await retention.sweep(yard.database, objects) == 0
    assert await retention.sweep(yard.database, objects) == 0
    assert await there(objects, entry) == [True]


async def test_the_worker_does_it(settings: Settings, database: Database) -> None:
    """The periodic job is there, and removes."""
    async with open_yard(settings, database) as yard:
        task = await staged(yard)
        entry = await task.add()
        await later(yard, days=2)
        objects = await open_store(settings, database)

        async def present() -> bool:
            return (await there(objects, entry))[0]

        from taskyard.worker import running_worker

        assert await present()
        async with running_worker(settings, database):
            await eventually(present, lambda found: not found, lambda _: "removal")
