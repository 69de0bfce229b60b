"""How automations look on the wire (tasks-api §10)."""

from __future__ import annotations

from typing import Any

from taskyard.accounts.present import timestamp
from taskyard.db.engine import Row

Json = dict[str, Any]

RUN_STATUS = {"completed": "success", "failed": "failed", "cancelled": "failed"}


def automation(row: Row) -> Json:
    """An automation; what it says about its last run is read from that run."""
    status: str | None = row["run_status"]
    return {
        "id": str(row["id"]),
        "name": row["title"],
        "prompt": row["description"],
        "repository": row["repository"],
        "github_integration": row["github_integration_id"],
        "cron_expression": row["cron_expression"],
        "timezone": row["timezone"],
        "template_id": row["template_id"],
        "enabled": row["enabled"],
        "last_run_at": timestamp(row["run_created_at"]),
        "last_run_status": None if status is None else RUN_STATUS.get(status, "running"),
        "last_task_id": str(row["task_id"]),
        "last_task_run_id": None if row["last_run_id"] is None else str(row["last_run_id"]),
        "last_error": row["error"] or (row["run_error"] if status == "failed" else None),
        "created_at": timestamp(row["created_at"]),
        "updated_at": timestamp(row["updated_at"]),
    }
