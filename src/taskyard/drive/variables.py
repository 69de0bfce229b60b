"""The sandbox environment of a run, and the variables that it gives to the agent (run-lifecycle §5.1, §5.3)."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from taskyard.db.engine import Database, Row
from taskyard.drive.failures import RunFailure
from taskyard.environments import service
from taskyard.security import SecretKeyError
from taskyard.settings import Settings


async def environment_of(database: Database, row: Row) -> Row | None:
    """The run's environment; None without one.

    It is looked up again: it may have gone, or become private, since the run was made.
    Raises RunFailure: environment_failed.
    """
    asked = row["state"].get("sandbox_environment_id")
    if asked is None:
        return None
    wanted = _uuid(asked)
    creator: int | None = row["task"]["created_by_id"]
    found = None
    if wanted is not None:
        found = await service.accessible(database, row["project_id"], wanted, creator)
    if found is None:
        raise RunFailure(
            "environment_failed",
            f"The sandbox environment {asked} does not exist, or is private to somebody else than the task's "
            "creator. Start a run with another one.",
        )
    return found


async def user_variables(settings: Settings, database: Database, environment: Row | None) -> dict[str, str]:
    """The variables of an environment, decrypted. Raises RunFailure: environment_failed."""
    if environment is None:
        return {}
    try:
        return await service.variables_for(database, settings, environment["id"])
    except SecretKeyError as error:
        raise RunFailure("environment_failed", error.detail) from error


def _uuid(value: Any) -> UUID | None:
    try:
        return UUID(str(value))
    except ValueError:
        return None
