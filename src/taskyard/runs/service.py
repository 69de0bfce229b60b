"""Rules of runs: creating, starting, changing them (tasks-api §4.8, §5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

from taskyard import json_schema
from taskyard.accounts.caller import Caller
from taskyard.artifacts import service as artifacts
from taskyard.db.engine import Connection, Database, Row
from taskyard.environments import secrets
from taskyard.environments import service as environments
from taskyard.errors import InvalidInputError, NotFoundError, PermissionDeniedError
from taskyard.forge import store as forge
from taskyard.jobs import enqueue_drive
from taskyard.runs import lifecycle, resume, store
from taskyard.runs.choices import Choices, check_runtime, chosen, inherit, state_of
from taskyard.runs.schemas import (
    PENDING_KEYS,
    TERMINAL,
    Authorship,
    RunCreate,
    RunFields,
    RunStart,
    RunTask,
    RunUpdate,
)
from taskyard.settings import Settings
from taskyard.tasks import service as tasks
from taskyard.tasks.present import as_object

USER_TOKEN_HOURS = 6
USER_ORIGINS = ("", "user_created", "slack")
"""Tasks of these origins are authored by their user when nobody says otherwise (step 5)."""


async def run_task(
    connection: Connection,
    caller: Caller,
    task_id: UUID,
    body: RunTask,
    agents: frozenset[str],
    *,
    state: dict[str, Any] | None = None,
    settings: Settings | None = None,
) -> Row:
    """Create a cloud run of a task and enqueue it, in one transaction; the task with its new run (§4.8).

    `agents` are the names that a request's `agent` may have; `state` is added to the run's. Without
    `settings` a `github_user_token` is not kept.
    """
    check_runtime(body)
    _check_agent(body, agents)
    task = await tasks.find(connection, caller, task_id)
    choices = chosen(body)
    new_state: dict[str, Any] = {}
    if body.resume_from_run_id is not None:
        previous = await store.of_task(connection, task["id"], body.resume_from_run_id)
        if previous is None:
            raise InvalidInputError(body={"detail": "Invalid resume_from_run_id"})
        choices = inherit(choices, previous)
        new_state["resume_from_run_id"] = str(previous["id"])
    ids = list(dict.fromkeys(body.pending_user_artifact_ids))
    if body.pending_user_message:
        new_state["pending_user_message"] = body.pending_user_message
    if ids:
        new_state["pending_user_artifact_ids"] = ids
    row = await _insert(
        connection, caller, task, body, choices, new_state | (state or {}), "cloud", settings, started=True
    )
    if ids:
        entries = await artifacts.attach_staged(connection, task["id"], row["id"], ids)
        row = await store.set_artifacts(connection, row["id"], entries)
    await lifecycle.created(connection, row)
    await enqueue_drive(connection, row["id"])
    # The newest run of the task may be somebody else's by now.
    return {**await tasks.find(connection, caller, task_id), "run": row}


async def create(
    connection: Connection,
    caller: Caller,
    task_id: UUID,
    body: RunCreate,
    agents: frozenset[str],
    settings: Settings,
) -> Row:
    """Create a run that nothing starts: a client drives it, or starts it later (§5.2)."""
    check_runtime(body)
    _check_agent(body, agents)
    try:
        task = await tasks.find(connection, caller, task_id)
    except NotFoundError:
        raise NotFoundError("Task not found") from None
    row = await _insert(
        connection, caller, task, body, chosen(body), {}, body.environment, settings, started=False
    )
    await lifecycle.created(connection, row)
    return row


def _check_agent(body: RunFields, agents: frozenset[str]) -> None:
    if body.agent is not None and body.agent not in agents:
        known = ", ".join(sorted(agents))
        raise InvalidInputError(f"There is no agent '{body.agent}' here. Known: {known}.", attr="agent")


async def _insert(
    connection: Connection,
    caller: Caller,
    task: Row,
    body: RunFields,
    choices: Choices,
    state: dict[str, Any],
    environment: str,
    settings: Settings | None,
    *,
    started: bool,
) -> Row:
    """Steps 5, 6, 8 and 10 of §4.8.2."""
    if body.priority > 0 and caller.role != "admin" and not caller.is_staff:
        raise PermissionDeniedError("Only admins of the project may give a run a priority above 0.")
    if body.github_user_token is None:
        how = "send github_user_token, or use pr_authorship_mode 'bot'"
        await _check_authorship(connection, caller, task, choices.pr_authorship_mode, how)
    if (wanted := choices.sandbox_environment_id) is not None:
        usable = await environments.accessible(connection, caller.project.id, wanted, task["created_by_id"])
        if usable is None and body.sandbox_environment_id is not None:
            raise InvalidInputError(body={"detail": "Invalid sandbox_environment_id"})
        if usable is None:
            # Inherited, and gone since.
            choices = replace(choices, sandbox_environment_id=None)
    row = await store.insert(
        connection,
        task["id"],
        caller.project.id,
        caller.user_id,
        environment=environment,
        branch=choices.branch,
        state=state_of(body, choices) | state,
        started=started,
    )
    authorship = choices.pr_authorship_mode or _default_authorship(task)
    if body.github_user_token is not None and authorship == Authorship.USER and settings is not None:
        box = await secrets.sealing_box(connection, settings)
        sealed = box.seal(body.github_user_token)
        await store.keep_user_token(connection, row["id"], sealed, USER_TOKEN_HOURS)
    return row


def _default_authorship(task: Row) -> Authorship:
    return Authorship.USER if task["origin_product"] in USER_ORIGINS else Authorship.BOT


async def _check_authorship(
    connection: Connection, caller: Caller, task: Row, mode: str | None, how: str
) -> None:
    """Who asks for commits as themselves on GitHub must be able to push there (step 5); the default never fails.

    A repository that was registered here needs no GitHub.
    """
    if mode != Authorship.USER or not task["repository"]:
        return
    if await forge.taken(connection, caller.project.id, task["repository"]):
        return
    raise InvalidInputError(
        f"Your GitHub account is not linked: {how}.",
        code="github_authorization_required",
        attr="pr_authorship_mode",
    )


async def update(connection: Connection, caller: Caller, task_id: UUID, run_id: UUID, body: RunUpdate) -> Row:
    """A PATCH of the agent or of a client (§5.4)."""
    await locked(connection, caller, task_id, run_id)
    sent = body.sent()
    changes: dict[str, Any] = {
        name: sent[name]
        for name in ("status", "stage", "branch", "environment", "error_message")
        if name in sent
    }
    if "output" in sent:
        output = sent["output"]
        changes["merge_output" if isinstance(output, dict) else "output"] = output
    if "state" in sent:
        if isinstance(sent["state"], dict):
            changes["state"] = {k: v for k, v in sent["state"].items() if not lifecycle.is_protected(k)}
        else:
            changes["replace_state"] = sent["state"]
    changes["remove_state"] = [key for key in body.state_remove_keys if not lifecycle.is_protected(key)]
    return await lifecycle.change(connection, run_id, **changes)


async def locked(connection: Connection, caller: Caller, task_id: UUID, run_id: UUID) -> Row:
    """The run, locked until the transaction ends; NotFoundError when the caller sees no such run of that task."""
    row = await store.get_locked(connection, caller, task_id, run_id)
    if row is None:
        raise NotFoundError
    return row


async def check_output(database: Database, caller: Caller, task_id: UUID, run_id: UUID, output: Any) -> bool:
    """Whether the task has a schema, which the output fits: then it completes the run (§5.5).

    Raises InvalidInputError when it does not fit. That can take seconds, so nothing is locked meanwhile.
    """
    if await store.get(database, caller, task_id, run_id) is None:
        raise NotFoundError
    async with database.connection() as connection:
        schema = await store.json_schema(connection, task_id)
    if schema is None:
        return False
    if (problem := await json_schema.value_problem(schema, output)) is not None:
        raise InvalidInputError(body={"error": f"Output validation error: {problem}"})
    return True


async def set_output(
    connection: Connection, caller: Caller, task_id: UUID, run_id: UUID, output: Any, *, completes: bool
) -> Row:
    """Replace the output (§5.5).

    When that completes the run, it is answered as it is before: it completes a moment later, as its worker gets
    to it, or at once when none has it. One that has ended stays as it ended.
    """
    row = await locked(connection, caller, task_id, run_id)
    saved = await lifecycle.change(connection, run_id, output=output)
    if not completes or row["status"] in TERMINAL:
        return saved
    if not await store.ask_to_complete(connection, run_id):
        await lifecycle.change(connection, run_id, status="completed")
    return saved


async def start(connection: Connection, caller: Caller, task_id: UUID, run_id: UUID, body: RunStart) -> Row:
    """Start a cloud run that was created before (§5.6); the task with that run."""
    row = await locked(connection, caller, task_id, run_id)
    if row["environment"] != "cloud":
        raise InvalidInputError(body={"error": "Only cloud runs can be started via this endpoint"})
    if row["status"] not in ("queued", "not_started"):
        detail = f"Only queued or not_started cloud runs can be started (current status: {row['status']})"
        raise InvalidInputError(body={"error": detail})
    state: dict[str, Any] = {}
    if body.pending_user_message:
        state["pending_user_message"] = body.pending_user_message
    if ids := list(dict.fromkeys(body.pending_user_artifact_ids)):
        _, missing = artifacts.entries_of(row, ids)
        if missing:
            detail = "Some pending_user_artifact_ids are invalid for this run"
            raise InvalidInputError(body={"detail": detail, "missing_artifact_ids": missing})
        state["pending_user_artifact_ids"] = ids
    task = await tasks.find(connection, caller, task_id)
    if row["started_at"] is None:
        await store.take_away(connection, run_id)
        await enqueue_drive(connection, run_id)
    elif not state:
        # Started already, and nothing new: one run has one worker.
        return task
    await lifecycle.change(connection, run_id, state=state, start=row["started_at"] is None)
    return await tasks.find(connection, caller, task_id)


async def resume_in_cloud(connection: Connection, caller: Caller, task_id: UUID, run_id: UUID) -> Row:
    """Bring a local or ended run to the cloud, under its own id (§5.7).

    A worker that still cleans up after it loses it at once, and the new one waits until that is done.
    """
    row = await locked(connection, caller, task_id, run_id)
    if row["environment"] == "cloud" and row["status"] in ("queued", "in_progress"):
        raise InvalidInputError(body={"error": "Run is already active in cloud"})
    task = await tasks.find(connection, caller, task_id)
    if await store.user_token(connection, run_id) is None:
        # No request brings a token to a run that is there.
        how = "resume the run by a new one (resume_from_run_id), with github_user_token or pr_authorship_mode 'bot'"
        await _check_authorship(
            connection, caller, task, as_object(row["state"]).get("pr_authorship_mode"), how
        )
    await store.take_away(connection, run_id)
    if row["environment"] == "local":
        await resume.forget_checkpoint(connection, run_id)
    saved = await lifecycle.change(
        connection,
        run_id,
        environment="cloud",
        status="queued",
        error_message=None,
        state={"handoff_resumed": True, "mode": "interactive"},
        remove_state=PENDING_KEYS,
        start=True,
    )
    await enqueue_drive(connection, run_id)
    return saved
