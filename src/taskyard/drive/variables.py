"""What a run's sandbox environment gives to the agent (run-lifecycle §5.1, §5.3)."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from taskyard.db.engine import Database, Row
from taskyard.drive.failures import RunFailure
from taskyard.drive.recorder import Recorder
from taskyard.environments import domains, service
from taskyard.events import entries
from taskyard.security import SecretKeyError
from taskyard.settings import Settings


async def user_variables(
    settings: Settings, database: Database, row: Row, recorder: Recorder
) -> dict[str, str]:
    """The variables of the run's environment; none without one.

    The environment is looked up again: it may have gone, or become private, since the run was made.
    Raises RunFailure: environment_failed.
    """
    asked = row["state"].get("sandbox_environment_id")
    if asked is None:
        return {}
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
    recorder.add(entries.console(str(row["id"]), "warn", _network_note(settings, found)))
    try:
        return await service.variables_for(database, settings, found["id"])
    except SecretKeyError as error:
        raise RunFailure("environment_failed", error.detail) from error


def _network_note(settings: Settings, environment: Row) -> str:
    level: str = environment["network_access_level"]
    names = domains.effective(
        level,
        environment["allowed_domains"],
        environment["include_default_domains"],
        domains.trusted(settings),
    )
    asked = "" if level == "full" else f" to {len(names)} domain{'s' if len(names) != 1 else ''}"
    return (
        f"The sandbox environment '{environment['name']}' allows network access '{level}'{asked}. "
        "This server does not offer it yet: the run reaches the model gateway and nothing else."
    )


def _uuid(value: Any) -> UUID | None:
    try:
        return UUID(str(value))
    except ValueError:
        return None
