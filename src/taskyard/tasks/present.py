"""How runs and tasks look on the wire (tasks-api §2, §3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taskyard.accounts.present import moment, timestamp, user_basic
from taskyard.db.engine import Row
from taskyard.tasks.naming import slug

Json = dict[str, Any]

LogUrl = Callable[[str], str]
"""Makes the absolute, signed log URL of a run id."""

KNOWN: Mapping[str, frozenset[str]] = {
    "runtime_adapter": frozenset({"claude", "codex"}),
    "provider": frozenset({"anthropic", "openai"}),
    "reasoning_effort": frozenset({"low", "medium", "high", "xhigh", "max"}),
}


def as_object(value: Any) -> Json:
    """A stored value when it is an object, else an empty one: clients may set `state` and `output` to anything."""
    return value if isinstance(value, dict) else {}


def run(row: Row, log_url: LogUrl) -> Json:
    """A TaskRun, for the encoder of answers."""
    state = as_object(row["state"])

    def derived(name: str) -> Any:
        value = state.get(name)
        return value if isinstance(value, str) and value in KNOWN[name] else None

    model = state.get("model")
    return {
        "id": str(row["id"]),
        "task": str(row["task_id"]),
        "stage": row["stage"],
        "branch": row["branch"],
        "status": row["status"],
        "environment": row["environment"],
        "runtime_adapter": derived("runtime_adapter"),
        "provider": derived("provider"),
        "model": model if isinstance(model, str) else None,
        "reasoning_effort": derived("reasoning_effort"),
        "log_url": log_url(str(row["id"])),
        "error_message": row["error_message"],
        "output": row["output"],
        "state": row["state"],
        "artifacts": row["artifacts"],
        "created_at": moment(row["created_at"]),
        "updated_at": moment(row["updated_at"]),
        "completed_at": moment(row["completed_at"]),
    }


def state_event(row: Row) -> Json:
    """The `task_run_state` of the stream (run-lifecycle §7.3)."""
    return {
        "type": "task_run_state",
        "run_id": str(row["id"]),
        "task_id": str(row["task_id"]),
        "status": row["status"],
        "stage": row["stage"],
        "output": row["output"],
        "branch": row["branch"],
        "error_message": row["error_message"],
        "updated_at": timestamp(row["updated_at"]),
        "completed_at": timestamp(row["completed_at"]),
    }


def task(row: Row, log_url: LogUrl) -> Json:
    """A Task with its newest run, for the encoder of answers."""
    return {
        "id": row["id"],
        "task_number": row["task_number"],
        "slug": slug(row["project_name"], row["task_number"]),
        "title": row["title"],
        "title_manually_set": row["title_manually_set"],
        "description": row["description"],
        "origin_product": row["origin_product"],
        "repository": row["repository"],
        "github_integration": row["github_integration_id"],
        "github_user_integration": row["github_user_integration_id"],
        "signal_report": row["signal_report_id"],
        "json_schema": row["json_schema"],
        "internal": row["internal"],
        "latest_run": None if row["run"] is None else run(row["run"], log_url),
        "created_at": moment(row["created_at"]),
        "updated_at": moment(row["updated_at"]),
        "created_by": user_basic(row),
        "ci_prompt": row["ci_prompt"],
        "archived": row["archived"],
        "archived_at": moment(row["archived_at"]),
    }


def summary(row: Row) -> Json:
    """A task in short (tasks-api §4.7)."""
    status = row["latest_status"]
    return {
        "id": row["id"],
        "title": row["title"],
        "repository": row["repository"],
        "created_at": moment(row["created_at"]),
        "updated_at": moment(row["updated_at"]),
        "latest_run": None if status is None else {"status": status, "environment": row["environment"]},
        "origin_product": row["origin_product"],
    }
