"""How runs and tasks look on the wire (tasks-api §2, §3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

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


def timestamp(value: datetime | str | None) -> str | None:
    """ISO 8601 in UTC with microseconds and `Z`. Text comes from rows that the database made JSON of."""
    if value is None:
        return None
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if moment.utcoffset():  # connections ask for UTC, so this is rare
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")[:26] + "Z"


def as_object(value: Any) -> Json:
    """A stored value when it is an object, else an empty one: clients may set `state` and `output` to anything."""
    return value if isinstance(value, dict) else {}


def run(row: Row, log_url: LogUrl) -> Json:
    """A TaskRun."""
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
        "created_at": timestamp(row["created_at"]),
        "updated_at": timestamp(row["updated_at"]),
        "completed_at": timestamp(row["completed_at"]),
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


def user_basic(row: Row) -> Json | None:
    """A UserBasic, of a row that has the columns of `u` as in the SELECT of tasks; None without a user."""
    if row["user_id"] is None:
        return None
    return {
        "id": row["user_id"],
        "uuid": str(row["user_uuid"]),
        "distinct_id": row["distinct_id"],
        "first_name": row["first_name"],
        "last_name": row["last_name"],
        "email": row["email"],
        "is_email_verified": None,
        "hedgehog_config": None,
        "role_at_organization": None,
    }


def _id(value: UUID | None) -> str | None:
    return None if value is None else str(value)


def task(row: Row, log_url: LogUrl) -> Json:
    """A Task with its newest run."""
    return {
        "id": str(row["id"]),
        "task_number": row["task_number"],
        "slug": slug(row["project_name"], row["task_number"]),
        "title": row["title"],
        "title_manually_set": row["title_manually_set"],
        "description": row["description"],
        "origin_product": row["origin_product"],
        "repository": row["repository"],
        "github_integration": row["github_integration_id"],
        "github_user_integration": _id(row["github_user_integration_id"]),
        "signal_report": _id(row["signal_report_id"]),
        "json_schema": row["json_schema"],
        "internal": row["internal"],
        "latest_run": None if row["run"] is None else run(row["run"], log_url),
        "created_at": timestamp(row["created_at"]),
        "updated_at": timestamp(row["updated_at"]),
        "created_by": user_basic(row),
        "ci_prompt": row["ci_prompt"],
        "archived": row["archived"],
        "archived_at": timestamp(row["archived_at"]),
    }


def summary(row: Row) -> Json:
    """A task in short (tasks-api §4.7)."""
    status = row["latest_status"]
    return {
        "id": str(row["id"]),
        "title": row["title"],
        "repository": row["repository"],
        "created_at": timestamp(row["created_at"]),
        "updated_at": timestamp(row["updated_at"]),
        "latest_run": None if status is None else {"status": status, "environment": row["environment"]},
        "origin_product": row["origin_product"],
    }
