"""Rules of automations: what a schedule does, and when it stops (tasks-api §10)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from croniter import CroniterError

from taskyard.accounts.caller import Caller, Project
from taskyard.automations import store
from taskyard.automations.schedule import next_firing
from taskyard.automations.schemas import AutomationUpdate, AutomationWrite
from taskyard.db.engine import AWAY, Connection, Database, Row
from taskyard.errors import NotFoundError, PermissionDeniedError, TaskyardError
from taskyard.runs import service as runs
from taskyard.runs.schemas import RunTask
from taskyard.tasks import service as tasks
from taskyard.tasks.schemas import OriginProduct, TaskWrite

log = structlog.get_logger()

CATCH_UP = timedelta(minutes=5)
"""A firing that is later than this is skipped. Several that are due at once make one run."""
PAUSE_AFTER = 5
"""So many failures in a row disable an automation."""

OF_TASK = {
    "name": "title",
    "prompt": "description",
    "repository": "repository",
    "github_integration": "github_integration",
}
"""Fields of an automation that are its task's, and their names there."""
SCHEDULE = frozenset({"cron_expression", "timezone", "enabled"})


async def create(connection: Connection, caller: Caller, body: AutomationWrite) -> Row:
    """A new automation and its task, both or none."""
    fields = _of_task(body.sent())
    task = await tasks.create(
        connection, caller, TaskWrite(**fields, origin_product=OriginProduct.AUTOMATION)
    )
    own: dict[str, Any] = {
        "cron_expression": body.cron_expression,
        "timezone": body.timezone,
        "template_id": body.template_id,
        "enabled": body.enabled,
    }
    own["next_run_at"] = _upcoming(own, await store.now(connection))
    automation_id = await store.insert(connection, caller.project.id, caller.user_id, task["id"], own)
    return await find(connection, caller, automation_id)


async def update(connection: Connection, caller: Caller, automation_id: UUID, body: AutomationUpdate) -> Row:
    """Only the sent fields change. Enabling forgets the failures from before."""
    row = await _lock(connection, caller, automation_id)
    sent = body.sent()
    if of_task := _of_task(sent):
        change = TaskWrite(**of_task)
        await tasks.check(change)
        await tasks.update(connection, caller, row["task_id"], change)
    changes = {name: value for name, value in sent.items() if name not in OF_TASK}
    # What is sent as it was leaves alone a firing that is due at this moment.
    if any(changes[name] != row[name] for name in SCHEDULE & changes.keys()):
        now = await store.now(connection)
        changes["next_run_at"] = _upcoming({**row, **changes}, now)
        if changes.get("enabled") and not row["enabled"]:
            changes |= {"enabled_at": now, "error": None, "failed_starts": 0}
    await store.update(connection, automation_id, changes)
    return await find(connection, caller, automation_id)


async def find(source: Database | Connection, caller: Caller, automation_id: UUID) -> Row:
    """The automation, or NotFoundError."""
    row = await store.get(source, caller, automation_id)
    if row is None:
        raise NotFoundError
    return row


async def delete(connection: Connection, caller: Caller, automation_id: UUID) -> None:
    """Remove the automation; its task and their runs stay."""
    if not await store.delete(connection, caller, automation_id):
        raise NotFoundError


async def run_now(connection: Connection, caller: Caller, automation_id: UUID, agents: frozenset[str]) -> Row:
    """Start one run at once, whatever the schedule says."""
    row = await _lock(connection, caller, automation_id)
    await _start(connection, caller, row, agents)
    return await find(connection, caller, automation_id)


# --- the schedule --------------------------------------------------------------------------------------


async def fire_due(database: Database, agents: frozenset[str], now: datetime) -> int:
    """Start the runs that are due at a moment; how many.

    Each automation is fired in a transaction that also moves its next firing on, so however many workers
    do this at once, and whenever one of them dies, a firing makes one run.
    """
    started = 0
    while True:
        async with database.transaction() as connection:
            row = await store.lock_due(connection, now)
            if row is None:
                return started
            started += await _fire(connection, row, agents, now)


async def pause_failing(database: Database) -> int:
    """Disable the automations whose last runs all failed; how many."""
    paused = 0
    while True:
        async with database.transaction() as connection:
            row = await store.lock_failing(connection, PAUSE_AFTER)
            if row is None:
                return paused
            reason = f"Paused after {PAUSE_AFTER} failed runs in a row."
            if row["run_error"]:
                reason += f" The last one: {row['run_error']}"
            await _pause(connection, row, reason)
            paused += 1


async def _fire(connection: Connection, row: Row, agents: frozenset[str], now: datetime) -> bool:
    """One firing; True when it made a run. The automation is moved on in any case."""
    due: datetime = row["next_run_at"]
    if row["task_deleted_at"] is not None:
        await _pause(connection, row, "Paused: the task of this automation was deleted.")
        return False
    try:
        upcoming = _upcoming(row, now)
        in_time = due if now - due <= CATCH_UP else _upcoming(row, now - CATCH_UP)
    except (CroniterError, ValueError, LookupError) as error:
        # It was valid when it was written: another release of the time zones, say.
        await _pause(connection, row, f"Paused: the schedule cannot be read any more: {error}")
        return False
    changes: dict[str, Any] = {"next_run_at": upcoming}
    if in_time is None or in_time > now:
        changes["error"] = f"The run of {due:%Y-%m-%d %H:%M} UTC was skipped: no worker was running then."
        await store.update(connection, row["id"], changes)
        return False
    due = in_time  # those that were missed before it are made up for by nothing
    problem = None
    try:
        async with connection.transaction():
            await _start(connection, _creator(row), row, agents)
    except AWAY:
        raise
    except TaskyardError as error:
        problem = error.detail
    except Exception as error:
        # One broken automation must not keep the others from running.
        log.exception("starting the run of an automation failed", automation=str(row["id"]))
        problem = f"Internal error: {type(error).__name__}. See the server's log."
    if problem is not None:
        failed = row["failed_starts"] + 1
        problem = f"The run of {due:%Y-%m-%d %H:%M} UTC could not be started: {problem}"
        changes |= {"failed_starts": failed, "error": problem}
    await store.update(connection, row["id"], changes)
    if problem is not None and failed >= PAUSE_AFTER:
        await _pause(connection, row, f"Paused after {PAUSE_AFTER} failures in a row. {problem}")
    return problem is None


async def _start(connection: Connection, caller: Caller, row: Row, agents: frozenset[str]) -> None:
    state = {"automation_id": str(row["id"])}
    await runs.run_task(connection, caller, row["task_id"], RunTask(), agents, state=state)
    # Not the task's newest run: somebody may start another one at this moment.
    run_id = await store.newest_run(connection, row["task_id"], row["id"])
    await store.update(connection, row["id"], {"last_run_id": run_id, "error": None, "failed_starts": 0})


async def _pause(connection: Connection, row: Row, reason: str) -> None:
    log.warning("paused an automation", automation=str(row["id"]), reason=reason)
    await store.update(connection, row["id"], {"enabled": False, "next_run_at": None, "error": reason})


def _creator(row: Row) -> Caller:
    """Whoever made the automation, acting through it; PermissionDeniedError when they may no longer."""
    if row["role"] is None:
        raise PermissionDeniedError("whoever made this automation is no longer a member of the project.")
    return Caller(
        user_id=row["created_by_id"],
        email=row["email"],
        is_staff=row["is_staff"],
        scopes=frozenset({"task:write"}),
        key_id=None,
        project=Project(row["project_id"], row["project_name"], row["organization_id"]),
        role=row["role"],
    )


async def _lock(connection: Connection, caller: Caller, automation_id: UUID) -> Row:
    row = await store.lock(connection, caller, automation_id)
    if row is None:
        raise NotFoundError
    return row


def _of_task(sent: Mapping[str, Any]) -> dict[str, Any]:
    return {OF_TASK[name]: value for name, value in sent.items() if name in OF_TASK}


def _upcoming(automation: Mapping[str, Any], now: datetime) -> datetime | None:
    if not automation["enabled"]:
        return None
    return next_firing(automation["cron_expression"], automation["timezone"], now)
