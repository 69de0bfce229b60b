"""Artifact endpoints (tasks-api §4.9, §4.10, §7)."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, post
from litestar.params import FromPath
from litestar.response import Stream

from taskyard.accounts.caller import Caller, authorize
from taskyard.artifacts import paths, service
from taskyard.artifacts.schemas import ByPath, Finalize, Inline, Prepare
from taskyard.http import answer, body, origin_of, path_uuid
from taskyard.objects.interface import attachment, media_type

Req = Request[Caller, Any, Any]

MAX_INLINE_BYTES = 64 * 1024 * 1024
"""A request that brings artifacts itself: 30 MiB in base64 and some more. Larger ones go by prepare and finalize."""
READ = {"scope": "task:read"}


class StagedArtifactController(Controller):
    path = "/api/projects/{project_id:str}/tasks/{task_id:str}/staged_artifacts"
    guards = (authorize,)

    @post("/prepare_upload")
    async def prepare(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, Prepare)
        return artifacts(await service.prepare_staged(place(request, task_id), sent.artifacts))

    @post("/finalize_upload")
    async def finalize(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, Finalize)
        return artifacts(await service.finalize_staged(place(request, task_id), sent.artifacts))


class RunArtifactController(Controller):
    path = "/api/projects/{project_id:str}/tasks/{task_id:str}/runs/{run_id:str}/artifacts"
    guards = (authorize,)

    @post(request_max_body_size=MAX_INLINE_BYTES)
    async def upload(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, Inline)
        return artifacts(await service.upload(place(request, task_id), path_uuid(run_id), sent.artifacts))

    @post("/prepare_upload")
    async def prepare(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, Prepare)
        return artifacts(await service.prepare(place(request, task_id), path_uuid(run_id), sent.artifacts))

    @post("/finalize_upload")
    async def finalize(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, Finalize)
        return artifacts(await service.finalize(place(request, task_id), path_uuid(run_id), sent.artifacts))

    @post("/presign", opt=READ)
    async def presign(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, ByPath)
        return answer(await service.presign(place(request, task_id), path_uuid(run_id), sent.storage_path))

    @post("/download", opt=READ, status_code=200)
    async def download(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Stream:
        sent = await body(request, ByPath)
        entry, content = await service.download(place(request, task_id), path_uuid(run_id), sent.storage_path)
        headers = {
            "Cache-Control": "no-cache",
            "Content-Disposition": attachment(paths.safe_name(str(entry["name"]))),
            "Content-Length": str(content.size),
            "Content-Type": media_type(entry.get("content_type")),
            "X-Content-Type-Options": "nosniff",
        }
        return Stream(content.chunks, headers=headers)


def place(request: Req, task_id: str) -> service.Place:
    state = request.app.state
    return service.Place(
        state.database,
        state.objects,
        state.settings.objects.folder,
        origin_of(request),
        request.user,
        path_uuid(task_id),
    )


def artifacts(entries: list[dict[str, Any]]) -> Response[bytes]:
    return answer({"artifacts": entries})
