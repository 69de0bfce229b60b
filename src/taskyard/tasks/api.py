"""Task endpoints (tasks-api §4)."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, delete, get, patch, post, put
from litestar.params import FromPath

from taskyard.accounts.caller import Caller, authorize
from taskyard.http import answer, body, limit_offset, log_urls, origin_of, page, path_uuid
from taskyard.schemas import parse_query
from taskyard.tasks import present, service
from taskyard.tasks.schemas import Narrowing, Presence, Summaries, TaskQuery, TaskWrite

Req = Request[Caller, Any, Any]


class TaskController(Controller):
    path = "/api/projects/{project_id:str}/tasks"
    guards = (authorize,)

    @get()
    async def list_tasks(self, request: Req) -> Response[bytes]:
        query, (limit, offset) = parse_query(TaskQuery, request.query_params), limit_offset(request)
        count_limit = request.app.state.settings.tasks.search_count_limit
        async with request.app.state.database.connection() as connection:
            rows, count = await service.page(
                connection, request.user, query, limit, offset, count_limit=count_limit
            )
        log_url = log_urls(request)
        results = [present.task(row, log_url) for row in rows]
        return page(request, origin_of(request), results, count, limit, offset)

    @get("/repositories")
    async def repositories(self, request: Req) -> Response[bytes]:
        return answer({"repositories": await service.repositories(request.app.state.database, request.user)})

    @post("/summaries", scope="task:read")
    async def summaries(self, request: Req) -> Response[bytes]:
        sent, (limit, offset) = await body(request, Summaries), limit_offset(request)
        rows, count = await service.summaries(
            request.app.state.database, request.user, sent.ids, limit, offset
        )
        results = [present.summary(row) for row in rows]
        return page(request, origin_of(request), results, count, limit, offset)

    @post("/{task_id:str}/presence", status_code=204)
    async def present(self, request: Req, task_id: FromPath[str]) -> None:
        """A device that looks at the task needs no push messages. There are none here: nothing is kept (§4.12)."""
        await body(request, Presence)
        await service.find(request.app.state.database, request.user, path_uuid(task_id))

    @delete("/{task_id:str}/presence", status_code=204)
    async def absent(self, request: Req, task_id: FromPath[str]) -> None:
        await service.find(request.app.state.database, request.user, path_uuid(task_id))

    @post()
    async def create(self, request: Req) -> Response[bytes]:
        sent = await body(request, TaskWrite)
        row = await service.create(request.app.state.new_tasks, request.user, sent)
        return answer(present.task(row, log_urls(request)), 201)

    @get("/{task_id:str}")
    async def retrieve(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        query = parse_query(Narrowing, request.query_params)
        row = await service.find(request.app.state.database, request.user, path_uuid(task_id), query)
        return answer(present.task(row, log_urls(request)))

    @patch("/{task_id:str}")
    async def update(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        return await self._update(request, task_id)

    @put("/{task_id:str}")
    async def replace(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        """The same as an update: no field is required (§1.1)."""
        return await self._update(request, task_id)

    async def _update(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        sent, query = await body(request, TaskWrite), parse_query(Narrowing, request.query_params)
        await service.check(sent)
        async with request.app.state.database.transaction() as connection:
            row = await service.update(connection, request.user, path_uuid(task_id), sent, query)
        return answer(present.task(row, log_urls(request)))

    @delete("/{task_id:str}", status_code=204)
    async def delete(self, request: Req, task_id: FromPath[str]) -> None:
        query = parse_query(Narrowing, request.query_params)
        async with request.app.state.database.transaction() as connection:
            await service.delete(connection, request.user, path_uuid(task_id), query)
