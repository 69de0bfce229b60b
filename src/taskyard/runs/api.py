"""Run endpoints (tasks-api §4.8, §5, §6)."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, get, patch, post
from litestar.params import FromPath
from litestar.response import Stream

from taskyard.accounts.caller import Caller, authorize
from taskyard.db.engine import Row
from taskyard.errors import NotFoundError
from taskyard.events import log, stream
from taskyard.events import store as events
from taskyard.events.entries import Shown
from taskyard.http import answer, body, limit_offset, log_urls, origin_of, page, path_uuid
from taskyard.runs import service, store
from taskyard.runs.schemas import RunTask, RunUpdate
from taskyard.tasks import present

Req = Request[Caller, Any, Any]

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
LOG_HEADERS = {"Cache-Control": "no-cache"}


class RunController(Controller):
    path = "/api/projects/{project_id:str}/tasks/{task_id:str}"
    guards = (authorize,)

    @post("/run")
    async def run_task(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        """Create a run and start it: 200 with the task (§4.8)."""
        sent = await body(request, RunTask)
        async with request.app.state.database.transaction() as connection:
            row = await service.run_task(
                connection, request.user, path_uuid(task_id), sent, request.app.state.agents
            )
        return answer(present.task(row, log_urls(request)))

    @get("/runs")
    async def list_runs(self, request: Req, task_id: FromPath[str]) -> Response[bytes]:
        limit, offset = limit_offset(request)
        database, project = request.app.state.database, request.user.project
        task = path_uuid(task_id)
        if not await store.task_exists(database, project.id, task):
            raise NotFoundError
        rows, count = await store.page(database, project.id, task, limit, offset)
        log_url = log_urls(request)
        results = [present.run(row, log_url) for row in rows]
        return page(request, origin_of(request), results, count, limit, offset)

    @get("/runs/{run_id:str}")
    async def retrieve(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        return answer(present.run(await find(request, task_id, run_id), log_urls(request)))

    @patch("/runs/{run_id:str}")
    async def update(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, RunUpdate)
        async with request.app.state.database.transaction() as connection:
            row = await service.update(connection, request.user, path_uuid(task_id), path_uuid(run_id), sent)
        return answer(present.run(row, log_urls(request)))

    @get("/runs/{run_id:str}/logs")
    async def logs(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Stream:
        row = await find(request, task_id, run_id)
        lines = log.lines(request.app.state.database, [row["id"]])
        return Stream(lines, media_type="application/jsonl", headers=LOG_HEADERS)

    @get("/runs/{run_id:str}/stream")
    async def stream(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Stream:
        """Server-sent events (run-lifecycle §7.2)."""
        row = await find(request, task_id, run_id)
        database, hub = request.app.state.database, request.app.state.hub
        after = stream.position(request.headers.get("last-event-id"))
        if after is None:
            latest = request.query_params.get("start") == "latest"
            after = await events.last_seq(database, row["id"]) if latest else 0
        frames = stream.frames(database, hub, row["id"], after=after)
        return Stream(frames, media_type="text/event-stream", headers=STREAM_HEADERS)


async def find(request: Req, task_id: str, run_id: str) -> Row:
    """The run in the path, or NotFoundError."""
    project = request.user.project
    row = await store.get(request.app.state.database, project.id, path_uuid(task_id), path_uuid(run_id))
    if row is None:
        raise NotFoundError
    return row


@get("/api/logs/{run_id:str}")
async def signed_log(request: Req, run_id: FromPath[str]) -> Stream:
    """The log of a run by its signed `log_url`, without credentials (§3); 404 before the first entry."""
    wanted = path_uuid(run_id)
    query = request.query_params
    signer = request.app.state.signer
    if not signer.valid(f"log:{wanted}", query.get("expires", ""), query.get("signature", "")):
        raise NotFoundError("This link is not valid or has expired. Get the run again for a new one.")
    database = request.app.state.database
    if not await events.read(database, wanted, Shown.LOG, after=0, limit=1):
        raise NotFoundError("This run has no log yet.")
    return Stream(log.lines(database, [wanted]), media_type="application/jsonl", headers=LOG_HEADERS)
