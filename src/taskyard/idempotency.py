"""`Idempotency-Key` on the requests that create something or act: a request sent twice is done once.

The first request with a key and its answer share one transaction: what was created and the memory of it are
committed together or not at all. The same request with that key waits for the first one and gets its answer; another
request with it is refused. Keys belong to a user in a project, and are forgotten after a day.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any, LiteralString

import psycopg
from litestar import Request
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from taskyard import json_schema
from taskyard.accounts.caller import Caller, authorize
from taskyard.commands.schemas import MESSAGES
from taskyard.db.engine import Connection, Database, Row
from taskyard.errors import InvalidInputError, TaskyardError

PROJECT = "/api/projects/{project_id}"
TASK = f"{PROJECT}/tasks/{{task_id}}"
RUN = f"{TASK}/runs/{{run_id}}"
COMMAND = f"{RUN}/command"
TASKS = f"{PROJECT}/tasks"
SLOW = frozenset(
    {
        f"{TASK}/staged_artifacts/finalize_upload",
        f"{RUN}/artifacts",
        f"{RUN}/artifacts/finalize_upload",
        f"{RUN}/set_output",
    }
)
"""These wait for object storage, and need a second connection for a moment; or a JSON Schema is applied in a process of
its own. A large body of TASKS may bring such a schema, too."""
KEYED = frozenset(
    {
        ("POST", TASKS),
        ("POST", f"{TASK}/run"),
        ("POST", f"{TASK}/runs"),
        ("POST", f"{RUN}/start"),
        ("POST", f"{RUN}/resume_in_cloud"),
        ("PATCH", f"{RUN}/set_output"),
        ("POST", f"{RUN}/append_log"),
        ("POST", f"{RUN}/relay_message"),
        ("POST", COMMAND),
        ("POST", f"{TASK}/staged_artifacts/prepare_upload"),
        ("POST", f"{RUN}/artifacts/prepare_upload"),
        ("POST", f"{TASK}/staged_artifacts/finalize_upload"),
        ("POST", f"{RUN}/artifacts"),
        ("POST", f"{RUN}/artifacts/finalize_upload"),
        ("POST", f"{PROJECT}/sandbox_environments"),
        ("POST", f"{PROJECT}/task_automations"),
        ("POST", f"{PROJECT}/task_automations/{{automation_id}}/run"),
        ("POST", f"{PROJECT}/repositories"),
    }
)
"""The routes that take a key. Their handlers must not wait for other processes: see `one_transaction`. So of commands
only messages take part, which are queued; the others are answered by the agent, and harmless when repeated."""

SLOW_AT_ONCE = 3
"""Keyed requests of one process at once that are slow; more wait, so that they cannot take all connections."""
MAX_LENGTH = 255
FORGOTTEN_AFTER: LiteralString = "interval '24 hours'"
NEVER_REMEMBERED = frozenset({401, 403, 429})
"""These say nothing about the request itself: the same one may be answered differently in a moment."""


class IdempotencyKeyReusedError(TaskyardError):
    """This Idempotency-Key was used for another request. Take a new key for a new request."""

    status = 422
    type = "invalid_request"
    code = "idempotency_key_reused"


def idempotent(app: ASGIApp) -> ASGIApp:
    """Middleware for the whole application; it touches only requests of KEYED that come with a key."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path_template")
        if (scope.get("method"), path) not in KEYED:
            await app(scope, receive, send)
            return
        request: Request[Caller, Any, Any] = Request(scope, receive, send)
        key = request.headers.get("idempotency-key")
        if key is None or (path == COMMAND and not is_message(await request.body())):
            await app(scope, receive, send)
            return
        if not 0 < len(key) <= MAX_LENGTH or not (key.isascii() and key.isprintable()):
            raise InvalidInputError(
                f"Idempotency-Key must be 1 to {MAX_LENGTH} printable ASCII characters.",
                attr="Idempotency-Key",
            )
        await authorize(request, scope["route_handler"])
        if path in SLOW or (path == TASKS and len(await request.body()) > json_schema.SMALL):
            async with request.app.state.setdefault("slow_keyed", asyncio.Semaphore(SLOW_AT_ONCE)):
                answer = await _once(app, request, key)
        else:
            answer = await _once(app, request, key)
        await answer.send(send)

    return wrapped


def is_message(body: bytes) -> bool:
    """Whether a command is a message to the agent; a body that is nothing of the kind is refused by its handler."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    method = value.get("method") if isinstance(value, dict) else None
    return isinstance(method, str) and method in MESSAGES


class Answer:
    """An answer that is held back until it is committed."""

    def __init__(self) -> None:
        self.start: Message | None = None
        self.body = bytearray()

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
        elif message["type"] == "http.response.body":
            self.body += message["body"]

    @property
    def status(self) -> int:
        assert self.start is not None
        return int(self.start["status"])  # type: ignore[typeddict-item] # it is a start

    @property
    def content_type(self) -> str:
        assert self.start is not None
        headers = dict(self.start["headers"])  # type: ignore[typeddict-item] # it is a start
        return str(headers.get(b"content-type", b"").decode("latin-1"))

    async def send(self, send: Send) -> None:
        assert self.start is not None
        await send(self.start)
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": False})

    @classmethod
    def remembered(cls, row: Row) -> Answer:
        """The first answer again, marked as such."""
        answer = cls()
        answer.body += row["body"]
        headers = [
            (b"content-type", row["content_type"].encode("latin-1")),
            (b"content-length", str(len(answer.body)).encode()),
            (b"idempotent-replayed", b"true"),
        ]
        answer.start = {"type": "http.response.start", "status": row["status"], "headers": headers}
        return answer


async def _once(app: ASGIApp, request: Request[Caller, Any, Any], key: str) -> Answer:
    database: Database = request.app.state.database
    parts = request.scope["path"].encode(), request.scope["query_string"], await request.body()
    digest = hashlib.sha256(b"\0".join(parts)).digest()
    answer = Answer()
    async with database.one_transaction() as connection:
        owner = {"project": request.user.project.id, "user": request.user.user_id, "key": key}
        if not await _claim(connection, owner, digest):
            first = await _first(connection, owner)
            if bytes(first["request_hash"]) != digest:
                raise IdempotencyKeyReusedError
            return Answer.remembered(first)
        await app(request.scope, request.receive, answer.take)
        if answer.status >= 500 or answer.status in NEVER_REMEMBERED or 300 <= answer.status < 400:
            raise psycopg.Rollback
        await _remember(connection, owner, answer)
    return answer


CLAIM: LiteralString = (
    "INSERT INTO idempotency_keys AS i (project_id, user_id, key, request_hash)"
    " VALUES (%(project)s, %(user)s, %(key)s, %(hash)s)"
    " ON CONFLICT (project_id, user_id, key) DO UPDATE"
    " SET request_hash = excluded.request_hash, created_at = excluded.created_at, status = NULL"
    " WHERE i.created_at < clock_timestamp() - " + FORGOTTEN_AFTER + " RETURNING 1"
)


async def _claim(connection: Connection, owner: dict[str, Any], digest: bytes) -> bool:
    """Whether the key is ours; waits while another request that holds it is in progress."""
    cursor = await connection.execute(CLAIM, {**owner, "hash": digest})
    if await cursor.fetchone() is None:
        return False
    # A few of the forgotten ones go with each new one.
    await connection.execute(
        "DELETE FROM idempotency_keys WHERE (project_id, user_id, key) IN ("
        "SELECT project_id, user_id, key FROM idempotency_keys"
        " WHERE created_at < clock_timestamp() - " + FORGOTTEN_AFTER + " ORDER BY created_at LIMIT 10"
        " FOR UPDATE SKIP LOCKED)"
    )
    return True


async def _first(connection: Connection, owner: dict[str, Any]) -> Row:
    """The request that had the key first; `_claim` has locked its row."""
    cursor = await connection.execute(
        "SELECT * FROM idempotency_keys"
        " WHERE project_id = %(project)s AND user_id = %(user)s AND key = %(key)s",
        owner,
    )
    row = await cursor.fetchone()
    assert row is not None
    return row


async def _remember(connection: Connection, owner: dict[str, Any], answer: Answer) -> None:
    await connection.execute(
        "UPDATE idempotency_keys SET status = %(status)s, content_type = %(type)s, body = %(body)s"
        " WHERE project_id = %(project)s AND user_id = %(user)s AND key = %(key)s",
        {**owner, "status": answer.status, "type": answer.content_type, "body": bytes(answer.body)},
    )
