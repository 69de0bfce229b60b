"""The way of an artifact when the site keeps its objects on S3."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from taskyard.artifacts import retention
from taskyard.db.engine import Database
from taskyard.objects.service import open_store
from taskyard.settings import ObjectSettings, Settings
from tests.support.artifacts import MIB, OfRun, Staged, item, named, send
from tests.support.s3 import s3_settings
from tests.support.yard import Run, Yard, ok, open_yard


@pytest.fixture
async def s3_yard(settings: Settings, database: Database, s3_url: str) -> AsyncIterator[Yard]:
    own = settings.model_copy(update={"objects": ObjectSettings(s3=s3_settings(s3_url))})
    async with open_yard(own, database) as yard:
        yield yard


async def test_from_upload_to_removal(s3_yard: Yard, s3_url: str) -> None:
    api = s3_yard.api()
    task = Staged(api, (await api.create_task(title="t"))["id"])
    entry = (await task.prepare(item("ü 名 #1.txt", size=100)))[0]
    assert entry["presigned_post"]["url"].startswith(s3_url)
    absent = await task.call("finalize", named(entry))
    assert absent.json() == {"error": "Artifact upload not found in object storage"}
    await send(api, entry)
    final = (await task.finalize(entry))[0]
    assert (final["size"], final["name"]) == (5, "ü 名 #1.txt")
    started = ok(await task.run(final["id"]))["latest_run"]
    assert started["artifacts"] == [final]
    run = OfRun(Run(api, task.task_id, started["id"]))
    inline = await run.add("pack", "x" * MIB, content_type="text/x-pack")
    for one, data in ((final, b"hello"), (inline, b"x" * MIB)):
        got = await run.download(one["storage_path"])
        assert (got.content, got.headers["content-length"]) == (data, str(len(data)))
        url = ok(await run.call("presign", {"storage_path": one["storage_path"]}))["url"]
        assert url.startswith(s3_url)
        shown = await s3_yard.client.get(url)
        assert (shown.status_code, shown.content) == (200, data)
        assert shown.headers["content-type"] == one["content_type"]
        assert shown.headers["content-disposition"].startswith("attachment; ")
    await run.run.cancel()
    for table in ("stored_objects SET keep_until", "runs SET updated_at"):
        await s3_yard.database.execute(f"UPDATE {table} = now() - interval '31 days'")
    store = await open_store(s3_yard.settings, s3_yard.database)
    assert await retention.sweep(s3_yard.database, store) == 2
    await store.close()
    gone = await run.download(inline["storage_path"])
    assert (gone.status_code, gone.json()) == (404, {"error": "Artifact content not found"})


async def test_odd_names_do_not_stop_the_removal(s3_yard: Yard) -> None:
    """Objects are removed by a list in XML: one key that XML cannot say would keep all of them, of all projects."""
    run = OfRun(await s3_yard.api().create_run())
    names = ["a\x01b", "a\x1b[31mb", "a\nb", "a\x7fb", "a\ufffeb", "a\\b", "ü😀&<>'\"%2f"]
    entries = [await run.add(name) for name in names]
    assert [entry["name"] for entry in entries] == names
    for entry in entries:
        assert (await run.download(entry["storage_path"])).content == b"hello"
    await run.run.cancel()
    for table in ("stored_objects SET keep_until", "runs SET updated_at"):
        await s3_yard.database.execute(f"UPDATE {table} = now() - interval '31 days'")
    store = await open_store(s3_yard.settings, s3_yard.database)
    assert await retention.sweep(s3_yard.database, store) == len(names)
    assert [await store.head(entry["storage_path"]) for entry in entries] == [None] * len(names)
    await store.close()
