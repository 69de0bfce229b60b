"""Task endpoints (tasks-api §4)."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, delete, get, patch, post, put
from litestar.params import FromPath

from taskyard.accounts.caller import Caller, authorize
from taskyard.errors import NotFoundError
from taskyard.http import answer, body, limit_offset, log_urls, origin_of, page, path_uuid
from taskyard.tasks import present, service, store
from taskyard.tasks.schemas import TaskWrite

Req = Request[Caller, Any, Any]


class TaskController(Controller):
    path = "/api/projects/{project_id:str}/tasks"
    guards = (authorize,)

    @get()
    async def list_tasks(self, request: Req) -> Response[bytes]:
        limit, offset = limit_offset(request)
        project = request.user.project
        rows, count = await store.page(request.app.state.database, project.id, limit, offset)
        log_url = log_urls(request)
        results = [present.task(row, log_url) for row in rows]
        return page(request, origin_of(request), results, count, limit, offset)

    @post()
    async def create(self, request: Req) -> Response[bytes]:
        sent = await body(request, TaskWrite)
        async with request.app.state.database.transaction() as connection:
            row = await service.create(connection, request.user, sent)
        return answer(present.task(row, log_urls(request)), 201)

    @get("/{task_id:str}")
    async def retrieve(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        project = request.user.project
        row = await store.get(request.app.state.database, project.id, path_uuid(task_id))
        if row is None:
            raise NotFoundError
        return answer(present.task(row, log_urls(request)))

    @patch("/{task_id:str}")
    async def update(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        return await self._update(request, task_id)

    @put("/{task_id:str}")
    async def replace(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        """The same as an update: no field is required (§1.1)."""
        return await self._update(request, task_id)

    async def _update(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, TaskWrite)
        async with request.app.state.database.transaction() as connection:
            row = await service.update(connection, request.user, path_uuid(task_id), sent)
        return answer(present.task(row, log_urls(request)))

    @delete("/{task_id:str}", status_code=204)
    async def delete(self, request: Req, task_id: FromPath[str]) -> None:
        async with request.app.state.database.transaction() as connection:
            await service.delete(connection, request.user, path_uuid(task_id))
