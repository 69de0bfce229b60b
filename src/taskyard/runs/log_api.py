"""What runs say and are told by their agents: log, stream, tokens, relay, upload of events (tasks-api §6)."""

from __future__ import annotations

import time
from typing import Any

from litestar import Controller, Request, Response, get, post
from litestar.exceptions import InternalServerException
from litestar.params import FromPath
from litestar.response import Stream

from taskyard.accounts.caller import Caller, authorize, still_allowed
from taskyard.errors import NotAuthenticatedError, NotFoundError, PermissionDeniedError
from taskyard.events import entries, log, stream
from taskyard.events import store as events
from taskyard.events.entries import Shown
from taskyard.events.ingest import RefusedError, Upload
from taskyard.http import answer, begun, body, log_urls, path_uuid
from taskyard.runs import log_query, store, tokens
from taskyard.runs.api import find
from taskyard.runs.schemas import AppendLog, RelayMessage
from taskyard.tasks import present

Req = Request[Caller, Any, Any]

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
LOG_HEADERS = {"Cache-Control": "no-cache"}
INGEST_SPARE_S = 3600


class RunLogController(Controller):
    path = "/api/projects/{project_id:str}/tasks/{task_id:str}/runs/{run_id:str}"
    guards = (authorize,)

    @post("/append_log")
    async def append_log(
        self, request: Req, task_id: FromPath[str], run_id: FromPath[str]
    ) -> Response[bytes]:
        """Entries for the log alone: nothing of it is on the stream (§6.1)."""
        sent = await body(request, AppendLog)
        began = time.perf_counter()
        row = await find(request, task_id, run_id)
        # Chunks of a message are noise in a log: the joined message follows.
        items = [entries.raw(item, Shown.LOG) for item in sent.entries if not entries.is_message_chunk(item)]
        if items:
            async with request.app.state.database.connection() as connection:
                await events.append(connection, row["id"], items, heartbeat=True)
        return answer(present.run(row, log_urls(request)), headers=timing("append", began))

    @get("/logs")
    async def logs(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Stream:
        """The logs of the run and of those that it resumes, oldest first (§6.2)."""
        began = time.perf_counter()
        row = await find(request, task_id, run_id)
        state = request.app.state
        lines = await begun(log.lines(state.record, await store.chain(state.database, row)))
        headers = LOG_HEADERS | timing("lookup", began)
        return Stream(lines, media_type="application/jsonl", headers=headers)

    @get("/session_logs")
    async def session_logs(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Stream:
        """Entries of this run's log as an array, filtered and paged (§6.3)."""
        query = log_query.parse(request.query_params)
        began = time.perf_counter()
        row = await find(request, task_id, run_id)
        record = request.app.state.record
        counts = await record.count(row["id"], query.wanted)
        array = await begun(
            log.array(
                record, row["id"], query.wanted, last=counts.last, limit=query.limit, offset=query.offset
            )
        )
        headers = {
            "X-Total-Count": str(counts.total),
            "X-Filtered-Count": str(counts.matching),
            "X-Matching-Count": str(counts.matching),
            "X-Has-More": "true" if query.offset + query.limit < counts.matching else "false",
        }
        return Stream(
            array, media_type="application/json", headers=headers | LOG_HEADERS | timing("count", began)
        )

    @get("/stream")
    async def stream(self, request: Req, task_id: FromPath[str], run_id: FromPath[str]) -> Stream:
        """Server-sent events (run-lifecycle §7.2)."""
        row = await find(request, task_id, run_id)
        state = request.app.state
        after = stream.position(request.headers.get("last-event-id"))
        if after is None:
            latest = request.query_params.get("start") == "latest"
            after = await events.last_seq(state.database, row["id"]) if latest else 0
        frames = stream.frames(state.tails, row["id"], after=after, allowed=lambda: still_allowed(request))
        return Stream(frames, media_type="text/event-stream", headers=STREAM_HEADERS)

    @get("/connection_token", opt={"scope": "task:write"})
    async def connection_token(
        self, request: Req, task_id: FromPath[str], run_id: FromPath[str]
    ) -> Response[bytes]:
        """A token for talking to the agent (§6.5); with `?audience=` that of §6.8, one for uploading its events."""
        row = await find(request, task_id, run_id)
        state = request.app.state
        if request.query_params.get("audience") == tokens.INGEST:
            lifetime_s = state.settings.runs.wall_clock_s + INGEST_SPARE_S
            return answer({"token": state.run_tokens.ingest(row, lifetime_s)})
        user = request.user
        distinct_id = await store.distinct_id(state.database, user.user_id)
        mode = present.as_object(row["state"]).get("mode")
        mode = mode if isinstance(mode, str) else "interactive"
        return answer({"token": state.run_tokens.connection(row, user.user_id, distinct_id, mode)})

    @post("/relay_message")
    async def relay_message(
        self, request: Req, task_id: FromPath[str], run_id: FromPath[str]
    ) -> Response[bytes]:
        """The text at the end of a turn, for a chat thread. There is no chat here: it is checked and dropped (§6.7)."""
        await body(request, RelayMessage)
        await find(request, task_id, run_id)
        return answer({"status": "skipped"})


@post(
    "/api/projects/{project_id:str}/tasks/{task_id:str}/runs/{run_id:str}/event_stream",
    request_max_body_size=None,
)
async def event_stream(
    request: Request[Any, Any, Any], project_id: FromPath[str], task_id: FromPath[str], run_id: FromPath[str]
) -> Response[bytes]:
    """Events of a run, uploaded line by line by its agent under a token of its own (§6.8)."""
    state = request.app.state
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise NotAuthenticatedError
    allowed = state.run_tokens.check_ingest(token.strip())
    task, run = path_uuid(task_id), path_uuid(run_id)
    project_fits = project_id in ("@current", str(allowed.project_id))
    if (task, run) != (allowed.task_id, allowed.run_id) or not project_fits:
        raise PermissionDeniedError("The token is for another run.")
    if not await store.exists(state.database, allowed.project_id, task, run):
        raise NotFoundError
    upload = Upload(state.database, run)
    try:
        async for chunk in request.stream():
            await upload.feed(chunk)
        await upload.finish()
    except InternalServerException:
        # The framework's word for a client that left in the middle; nobody reads this.
        return answer({"error": "The request was not finished"}, 400)
    except RefusedError as error:
        last = await events.last_ingested(state.database, run)
        return answer({"error": str(error), "last_accepted_seq": last}, error.status)
    last = await events.last_ingested(state.database, run)
    return answer({"accepted": upload.accepted, "duplicate": upload.duplicate, "last_accepted_seq": last})


@get("/api/logs/{run_id:str}")
async def signed_log(request: Req, run_id: FromPath[str]) -> Stream:
    """The log of a run by its signed `log_url`, without credentials (§3); 404 before the first entry."""
    wanted = path_uuid(run_id)
    query = request.query_params
    signer = request.app.state.signer
    if not signer.valid(f"log:{wanted}", query.get("expires", ""), query.get("signature", "")):
        raise NotFoundError("This link is not valid or has expired. Get the run again for a new one.")
    record = request.app.state.record
    if not await record.has_log(wanted):
        raise NotFoundError("This run has no log yet.")
    lines = await begun(log.lines(record, [wanted]))
    return Stream(lines, media_type="application/jsonl", headers=LOG_HEADERS)


def timing(name: str, began: float) -> dict[str, str]:
    """How long the server worked before the body, in milliseconds."""
    return {"Server-Timing": f"{name};dur={(time.perf_counter() - began) * 1000:.1f}"}
