"""How sandbox environments look on the wire (tasks-api §9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskyard.accounts.present import timestamp, user_basic
from taskyard.db.engine import Row
from taskyard.environments.domains import effective

Json = dict[str, Any]

NOT_IN_LISTS = frozenset(
    {
        "include_default_domains",
        "has_environment_variables",
        "effective_domains",
        "setup_script",
        "mcp_servers",
        "image",
    }
)


def environment(row: Row, defaults: Sequence[str]) -> Json:
    """An environment; its variables never leave the server."""
    return {
        "id": str(row["id"]),
        "name": row["name"],
        "network_access_level": row["network_access_level"],
        "allowed_domains": row["allowed_domains"],
        "include_default_domains": row["include_default_domains"],
        "repositories": row["repositories"],
        "has_environment_variables": row["has_variables"],
        "private": row["private"],
        "setup_script": row["setup_script"],
        "mcp_servers": row["mcp_servers"],
        "worker_pool": row["worker_pool"],
        "image": row["image"],
        "internal": row["internal"],
        "effective_domains": effective(
            row["network_access_level"], row["allowed_domains"], row["include_default_domains"], defaults
        ),
        "created_by": user_basic(row),
        "created_at": timestamp(row["created_at"]),
        "updated_at": timestamp(row["updated_at"]),
    }


def item(row: Row) -> Json:
    """An environment as a list shows it."""
    return {name: value for name, value in environment(row, ()).items() if name not in NOT_IN_LISTS}
