"""What stands in the record: log entries and state events, as JSON text.

Run-lifecycle §7 and §8. An entry is turned into text once, here, in Python's default JSON style, and
that text is what log, stream and session view answer, byte for byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
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
class Entry:
    """One line of the record."""

    data: str
    shown: Shown = Shown.BOTH


def encode(value: Any) -> str:
    """JSON as the stream carries it: one line, blank after `,` and `:`, non-ASCII escaped."""
    return json.dumps(value)


def raw(value: Json, shown: Shown = Shown.BOTH) -> Entry:
    """Any object as it is, e.g. a `task_run_state` or an entry that a client appended."""
    return Entry(encode(value), shown)


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
