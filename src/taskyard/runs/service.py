"""Rules of runs: what a new run inherits and checks (tasks-api §4.8)."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from taskyard.accounts.caller import Caller
from taskyard.agents.adapters import CONTRACT_MODES, allowed_efforts
from taskyard.db.engine import Connection, Row
from taskyard.errors import InvalidInputError, NotFoundError
from taskyard.jobs import enqueue_drive
from taskyard.runs import lifecycle, store
from taskyard.runs.schemas import RunTask, RunUpdate
from taskyard.tasks import service as tasks

PROVIDERS = {"claude": "anthropic", "codex": "openai"}


async def run_task(
    connection: Connection, caller: Caller, task_id: UUID, body: RunTask, agents: frozenset[str]
) -> Row:
    """Create a cloud run of a task and enqueue it, in one transaction; the task with its new run.

    `agents` are the names that a request's `agent` may have.
    """
    check_runtime(body)
    task = await tasks.find(connection, caller, task_id)
    _check_parts_to_come(body)
    if body.agent is not None and body.agent not in agents:
        known = ", ".join(sorted(agents))
        raise InvalidInputError(f"There is no agent '{body.agent}' here. Known: {known}.", attr="agent")
    state = _state(body)
    row = await store.insert(
        connection,
        task["id"],
        caller.project.id,
        caller.user_id,
        environment="cloud",
        branch=body.branch,
        state=state,
        started=True,
    )
    await lifecycle.created(connection, row)
    await enqueue_drive(connection, row["id"])
    return await tasks.find(connection, caller, task_id)


async def update(connection: Connection, caller: Caller, task_id: UUID, run_id: UUID, body: RunUpdate) -> Row:
    """A client's PATCH (§5.4)."""
    row = await store.lock(connection, run_id)
    if row is None or row["task_id"] != task_id or row["project_id"] != caller.project.id:
        raise NotFoundError
    sent = body.sent()
    return await lifecycle.change(
        connection, run_id, **{k: sent[k] for k in ("status", "error_message") if k in sent}
    )


def check_runtime(body: RunTask) -> None:
    """Checks between the runtime fields, in the order of §4.8.1."""
    adapter, model, effort, mode = (
        body.runtime_adapter,
        body.model,
        body.reasoning_effort,
        body.initial_permission_mode,
    )
    if mode is not None and adapter is None:
        raise InvalidInputError(
            "This field requires runtime_adapter to be set.", attr="initial_permission_mode"
        )
    if mode is not None and adapter is not None and mode not in CONTRACT_MODES[adapter]:
        supported = ", ".join(f"'{name}'" for name in CONTRACT_MODES[adapter])
        raise InvalidInputError(
            f"Invalid choice '{mode}' for runtime_adapter '{adapter}'. Supported values: {supported}.",
            attr="initial_permission_mode",
        )
    if adapter is None and (model is not None or effort is not None):
        detail = "This field is required when selecting a cloud runtime."
        raise InvalidInputError(detail, attr="runtime_adapter")
    if adapter is not None and model is None:
        raise InvalidInputError("This field is required when selecting a cloud runtime.", attr="model")
    if (
        adapter is not None
        and effort is not None
        and effort not in (allowed := allowed_efforts(adapter, model))
    ):
        raise InvalidInputError(
            f"Reasoning effort '{effort}' is not supported for runtime_adapter '{adapter}' and model '{model}'. "
            f"Supported values: {', '.join(allowed) or 'none'}.",
            attr="reasoning_effort",
        )


def _state(body: RunTask) -> dict[str, Any]:
    """The `state` of a new run (§3.1): only what was sent, besides the mode."""
    state: dict[str, Any] = {"mode": body.mode}
    for name in (
        "pr_authorship_mode",
        "run_source",
        "signal_report_id",
        "runtime_adapter",
        "model",
        "reasoning_effort",
        "initial_permission_mode",
        "agent",
    ):
        if (value := getattr(body, name)) is not None:
            state[name] = value
    if body.runtime_adapter is not None:
        state["provider"] = PROVIDERS[body.runtime_adapter]
    if body.branch is not None:
        state["pr_base_branch"] = body.branch
    if body.pending_user_message:
        state["pending_user_message"] = body.pending_user_message
    return state


def _check_parts_to_come(body: RunTask) -> None:
    """Fields whose objects cannot exist on this server yet name nothing, and are refused as such."""
    if body.resume_from_run_id is not None:
        raise InvalidInputError(body={"detail": "Invalid resume_from_run_id"})
    if body.sandbox_environment_id is not None:
        raise InvalidInputError(body={"detail": "Invalid sandbox_environment_id"})
    if body.pending_user_artifact_ids:
        raise InvalidInputError(
            body={
                "detail": "Some pending_user_artifact_ids are invalid or expired",
                "missing_artifact_ids": body.pending_user_artifact_ids,
            }
        )
