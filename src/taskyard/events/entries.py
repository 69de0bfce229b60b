"""What stands in the record: log entries and state events, as JSON text.

Run-lifecycle §7 and §8. An entry is turned into text once, here, in Python's default JSON style, and
that text is what log, stream and session view answer, byte for byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntFlag
from typing import Any, Literal

Json = dict[str, Any]


class Shown(IntFlag):
    """Where an entry is seen (run-lifecycle §7.5)."""

    LOG = 1
    STREAM = 2
    BOTH = 3


@dataclass(frozen=True, slots=True)
class Filter:
    """Which entries of a log a reader wants (tasks-api §6.3)."""

    after: datetime | None = None
    """Only entries with a later time."""
    kinds: list[str] = field(default_factory=list)
    """Only these kinds; empty: all."""
    without: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the record. `kind` and `stamp` are what the session view filters by (tasks-api §6.3)."""

    data: str
    shown: Shown = Shown.BOTH
    kind: str = ""
    stamp: datetime | None = None


_FINITE = json.JSONEncoder(allow_nan=False)


def encode(value: Any) -> str:
    """JSON as the stream carries it: one line, blank after `,` and `:`, non-ASCII escaped."""
    try:
        return _FINITE.encode(value)
    except ValueError:
        # A number like 1e999 was read as infinity, which JSON cannot say. Not by a walk in Python: that can follow
        # fewer levels than the parser.
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))


def raw(value: Json, shown: Shown = Shown.BOTH) -> Entry:
    """Any object as it is, e.g. a `task_run_state` or an entry that a client appended."""
    return Entry(encode(value), shown, kind_of(value), stamp_of(value))


def kind_of(entry: Json) -> str:
    """The event type: `sessionUpdate` of a `session/update`, else the method, else ""."""
    message = entry.get("notification")
    if not isinstance(message, dict):
        return ""
    kind = message.get("method")
    if kind == "session/update":
        params = message.get("params")
        update = params.get("update") if isinstance(params, dict) else None
        kind = update.get("sessionUpdate") if isinstance(update, dict) else None
    if not isinstance(kind, str):
        return ""
    # The database's text takes neither NUL nor half a surrogate pair.
    return kind.replace("\0", "").encode(errors="ignore").decode()


def is_message_chunk(entry: Json) -> bool:
    """Whether it is a piece of a message that the log has joined (run-lifecycle §8.2)."""
    return kind_of(entry) == "agent_message_chunk" and entry["notification"]["method"] == "session/update"


def stamp_of(entry: Json) -> datetime | None:
    """The entry's time; None when it has none that can be parsed."""
    value = entry.get("timestamp")
    return parse_time(value) if isinstance(value, str) else None


def parse_time(text: str) -> datetime | None:
    """An ISO 8601 time, in UTC; without an offset it counts as UTC. None: no time, or none that can be told in UTC."""
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def notification(message: Json, shown: Shown = Shown.BOTH) -> Entry:
    """A JSON-RPC message as a log entry (run-lifecycle §8.1)."""
    return raw({"type": "notification", "timestamp": now(), "notification": message}, shown)


def named(method: str, params: Json, shown: Shown = Shown.BOTH) -> Entry:
    """A notification with method and params."""
    return notification({"jsonrpc": "2.0", "method": method, "params": params}, shown)


def session_update(session_id: str, update: Json, shown: Shown = Shown.BOTH) -> Entry:
    """A `session/update` of the agent."""
    return named("session/update", {"sessionId": session_id, "update": update}, shown)


def console(run_id: str, level: Literal["debug", "info", "warn", "error"], message: str) -> Entry:
    """A line of the server's own."""
    return named("_posthog/console", {"sessionId": run_id, "level": level, "message": message})


def progress(
    run_id: str,
    step: str,
    status: Literal["in_progress", "completed", "failed"],
    label: str,
    detail: str | None = None,
) -> Entry:
    """One step of the run's set-up or end; clients fold entries of one group into a card."""
    params: Json = {"sessionId": run_id, "step": step, "status": status, "label": label}
    params["group"] = f"setup:{run_id}"
    if detail is not None:
        params["detail"] = detail
    return named("_posthog/progress", params)


def now() -> str:
    """The time of an entry: ISO 8601, UTC, `+00:00`."""
    return datetime.now(UTC).isoformat()
