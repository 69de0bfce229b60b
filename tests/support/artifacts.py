"""Calls on the artifact endpoints that several tests make."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.yard import Api, Json, Run, ok

MIB = 1 << 20


def item(name: str = "notes.txt", **fields: Any) -> Json:
    """An attachment as the desktop announces it."""
    return {
        "name": name,
        "type": "user_attachment",
        "source": "posthog_code",
        "size": 5,
        "content_type": "text/plain",
        **fields,
    }


def named(entry: Json) -> Json:
    """A prepared entry as it is sent to finalize_upload."""
    return {key: entry[key] for key in ("id", "name", "type", "source", "content_type", "storage_path")}


async def send(api: Api, entry: Json, data: bytes = b"hello", name: str = "f") -> None:
    """Upload by the form of a prepared entry."""
    form = entry["presigned_post"]
    files = {"file": (name, data, "application/x-sent")}
    response = await api.client.post(form["url"], data=form["fields"], files=files)
    assert response.status_code == 204, response.text


class Staged:
    """The staged artifacts of a task."""

    def __init__(self, api: Api, task_id: str) -> None:
        self.api, self.task_id = api, task_id

    async def call(self, action: str, *items: Json) -> httpx.Response:
        path = f"tasks/{self.task_id}/staged_artifacts/{action}_upload/"
        return await self.api.post(path, {"artifacts": list(items)})

    async def prepare(self, *items: Json) -> list[Json]:
        return list(ok(await self.call("prepare", *items))["artifacts"])

    async def finalize(self, *entries: Json) -> list[Json]:
        return list(ok(await self.call("finalize", *map(named, entries)))["artifacts"])

    async def add(self, name: str = "notes.txt", data: bytes = b"hello", **fields: Any) -> Json:
        """A finalized upload; its entry."""
        entry = (await self.prepare(item(name, size=len(data), **fields)))[0]
        await send(self.api, entry, data)
        return (await self.finalize(entry))[0]

    async def run(self, *ids: str, **body: Any) -> httpx.Response:
        """Start a run that takes staged artifacts."""
        return await self.api.post(f"tasks/{self.task_id}/run/", {"pending_user_artifact_ids": ids, **body})


class OfRun:
    """The artifacts of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    async def call(self, action: str, body: Json, *, api: Api | None = None) -> httpx.Response:
        path = self.run.path(f"artifacts/{action}/" if action else "artifacts/")
        return await (api or self.run.api).post(path, body)

    async def prepare(self, *items: Json) -> list[Json]:
        return list(ok(await self.call("prepare_upload", {"artifacts": list(items)}))["artifacts"])

    async def finalize(self, *entries: Json) -> list[Json]:
        body = {"artifacts": [named(entry) for entry in entries]}
        return list(ok(await self.call("finalize_upload", body))["artifacts"])

    async def upload(self, *items: Json) -> list[Json]:
        """Inline; the whole manifest."""
        return list(ok(await self.call("", {"artifacts": list(items)}))["artifacts"])

    async def add(self, name: str = "out.txt", content: str = "hello", **fields: Any) -> Json:
        return (await self.upload({"name": name, "type": "output", "content": content, **fields}))[-1]

    async def download(self, path: str, *, api: Api | None = None) -> httpx.Response:
        return await self.call("download", {"storage_path": path}, api=api)
