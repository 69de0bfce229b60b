"""Run endpoints: create, start, read, change (tasks-api §4.8, §5)."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, get, patch, post
from litestar.params import FromPath

from taskyard.accounts.caller import Caller, authorize
from taskyard.db.engine import Row
from taskyard.errors import NotFoundError
from taskyard.http import answer, body, limit_offset, log_urls, origin_of, page, path_uuid
from taskyard.runs import queue, service, store
from taskyard.runs.schemas import RunCreate, RunStart, RunTask, RunUpdate, SetOutput
from taskyard.tasks import present

Req = Request[Caller, Any, Any]


class RunController(Controller):
    path = "/api/projects/{project_id:str}/tasks/{task_id:str}"
    guards = (authorize,)

    @post("/run")
    async def run_task(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        """Create a run and start it: 200 with the task (§4.8)."""
        sent = await body(request, RunTask)
        state = request.app.state
        async with state.database.transaction() as connection:
            row = await service.run_task(
                connection, request.user, path_uuid(task_id), sent, state.agents, settings=state.settings
            )
        return answer(present.task(row, log_urls(request)))

    @post("/runs")
    async def create(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        """Create a run that nothing starts: 201 with the run (§5.2)."""
        sent = await body(request, RunCreate)
        state = request.app.state
        async with state.database.transaction() as connection:
            row = await service.create(
                connection, request.user, path_uuid(task_id), sent, state.agents, state.settings
            )
        return answer(present.run(row, log_urls(request)), 201)

    @get("/runs")
    async def list_runs(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        limit, offset = limit_offset(request)
        database, task = request.app.state.database, path_uuid(task_id)
        if not await store.task_exists(database, request.user, task):
            raise NotFoundError
        rows, count = await store.page(database, request.user, task, limit, offset)
        log_url = log_urls(request)
        results = [present.run(row, log_url) for row in rows]
        return page(request, origin_of(request), results, count, limit, offset)

    @get("/runs/{run_id:str}")
    async def retrieve(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        row, state = await find(request, task_id, run_id), request.app.state
        if row["queued"]:
            place = await queue.waiting(state.database, row["id"], queue.Limits.of(state.settings))
            if place is not None:
                row["state"] = {**present.as_object(row["state"]), "queue": place}
        return answer(present.run(row, log_urls(request)))

    @patch("/runs/{run_id:str}")
    async def update(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, RunUpdate)
        async with request.app.state.database.transaction() as connection:
            row = await service.update(connection, request.user, path_uuid(task_id), path_uuid(run_id), sent)
        return answer(present.run(row, log_urls(request)))

    @patch("/runs/{run_id:str}/set_output")
    async def set_output(
        self, request: Req, task_id: FromPath[str], run_id: FromPath[str]
    ) -> Response[bytes]:
        sent = await body(request, SetOutput)
        database, of_run = request.app.state.database, (request.user, path_uuid(task_id), path_uuid(run_id))
        completes = await service.check_output(database, *of_run, sent.output)
        async with database.transaction() as connection:
            row = await service.set_output(connection, *of_run, sent.output, completes=completes)
        return answer(present.run(row, log_urls(request)))

    @post("/runs/{run_id:str}/start")
    async def start(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        """Start a run that was created before: 200 with the task (§5.6)."""
        sent = await body(request, RunStart)
        async with request.app.state.database.transaction() as connection:
            row = await service.start(connection, request.user, path_uuid(task_id), path_uuid(run_id), sent)
        return answer(present.task(row, log_urls(request)))

    @post("/runs/{run_id:str}/resume_in_cloud")
    async def resume_in_cloud(
        self, request: Req, task_id: FromPath[str], run_id: FromPath[str]
    ) -> Response[bytes]:
        async with request.app.state.database.transaction() as connection:
            row = await service.resume_in_cloud(
                connection, request.user, path_uuid(task_id), path_uuid(run_id)
            )
        return answer(present.run(row, log_urls(request)))


async def find(request: Req, task_id: str, run_id: str) -> Row:
    """The run in the path, or NotFoundError."""
    row = await store.get(request.app.state.database, request.user, path_uuid(task_id), path_uuid(run_id))
    if row is None:
        raise NotFoundError
    return row
