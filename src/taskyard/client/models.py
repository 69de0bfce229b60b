"""Objects of the API (tasks-api §2, §3). Fields that are not known here are ignored."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import msgspec

Json = dict[str, Any]

TERMINAL = frozenset({"completed", "failed", "cancelled"})
"""Statuses in which a run does nothing more."""


class User(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    uuid: str | None = None
    first_name: str | None = None
    last_name: str | None = None
    email: str | None = None


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    type: str
    storage_path: str
    id: str | None = None
    source: str | None = None
    size: int | None = None
    """In bytes."""
    content_type: str | None = None
    uploaded_at: datetime | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at a task."""

    id: str
    task: str
    status: str
    environment: str = "cloud"
    stage: str | None = None
    branch: str | None = None
    runtime_adapter: str | None = None
    provider: str | None = None
    model: str | None = None
    reasoning_effort: str | None = None
    log_url: str | None = None
    error_message: str | None = None
    output: Any = None
    state: Json = {}
    artifacts: tuple[Artifact, ...] = ()
    created_at: datetime | None = None
    updated_at: datetime | None = None
    completed_at: datetime | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done."""

    id: str
    title: str = ""
    slug: str = ""
    task_number: int | None = None
    title_manually_set: bool = False
    description: str = ""
    origin_product: str = ""
    repository: str | None = None
    json_schema: Any = None
    internal: bool = False
    latest_run: Run | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    created_by: User | None = None
    ci_prompt: str | None = None


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """A repository that the server knows: `name` is what a task's `repository` says."""

    name: str
    origin: str


class TaskPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a list (tasks-api §1.5)."""

    results: tuple[Task, ...]
    count: int = 0
    next: str | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a run's stream or log (run-lifecycle §7.3, §8.1).

    `raw` is the JSON text as the server sent it: the same event has the same text in stream and log.
    `id` is the position to resume a stream from; entries of a log have none.
    """

    data: Json
    raw: str
    id: str | None = None

    @property
    def type(self) -> str:
        """`task_run_state`, `notification`, `permission_request`, …"""
        value = self.data.get("type")
        return value if isinstance(value, str) else ""

    @property
    def method(self) -> str:
        """The JSON-RPC method inside, with one leading underscore at most; "" when there is none."""
        value = _dict(self.data.get("notification")).get("method")
        return ("_" + value.lstrip("_") if value.startswith("_") else value) if isinstance(value, str) else ""

    @property
    def params(self) -> Json:
        """The JSON-RPC parameters inside."""
        return _dict(_dict(self.data.get("notification")).get("params"))

    @property
    def update(self) -> Json:
        """What a `session/update` of the agent says; empty for other events."""
        return _dict(self.params.get("update")) if self.method == "session/update" else {}


def event(text: str, event_id: str | None = None) -> Event | None:
    """An event from its JSON text; None for text that is no JSON object (readers skip such lines)."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):  # the latter for JSON nested too deeply to read
        return None
    return Event(data=data, raw=text, id=event_id) if isinstance(data, dict) else None


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}
