"""What a new run is made of: checks between its fields, and what it inherits (tasks-api §4.8.1, §4.8.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import UUID

from taskyard.agents.adapters import CONTRACT_MODES, allowed_efforts
from taskyard.db.engine import Row
from taskyard.errors import InvalidInputError
from taskyard.runs.schemas import Authorship, Effort, RunFields, RuntimeAdapter, Source
from taskyard.tasks.present import as_object

PROVIDERS = {"claude": "anthropic", "codex": "openai"}
E = TypeVar("E", Authorship, Effort, RuntimeAdapter, Source)


@dataclass(frozen=True)
class Choices:
    """What a request asks for and, on resume, what the run before had. None: nobody said."""

    pr_authorship_mode: str | None
    run_source: str | None
    signal_report_id: str | None
    runtime_adapter: str | None
    model: str | None
    reasoning_effort: str | None
    agent: str | None
    sandbox_environment_id: UUID | None
    branch: str | None
    snapshot_external_id: str | None = None
    budget_cost: float | None = None
    budget_tokens: int | None = None
    allowed_models: list[str] | None = None


def chosen(body: RunFields) -> Choices:
    """The fields of a request. Work for a signal report is a bot's unless somebody says otherwise (step 3)."""
    authorship = body.pr_authorship_mode
    if authorship is None and body.run_source == Source.SIGNAL_REPORT:
        authorship = Authorship.BOT
    return Choices(
        pr_authorship_mode=authorship,
        run_source=body.run_source,
        signal_report_id=body.signal_report_id,
        runtime_adapter=body.runtime_adapter,
        model=body.model,
        reasoning_effort=body.reasoning_effort,
        agent=body.agent,
        sandbox_environment_id=body.sandbox_environment_id,
        branch=body.branch,
        budget_cost=body.budget_cost,
        budget_tokens=body.budget_tokens,
        allowed_models=body.allowed_models,
    )


def inherit(choices: Choices, previous: Row) -> Choices:
    """What the request leaves open comes from the run that it resumes; then the effort is checked again."""
    state = as_object(previous["state"])
    merged = replace(
        choices,
        pr_authorship_mode=choices.pr_authorship_mode or _member(Authorship, state.get("pr_authorship_mode")),
        run_source=choices.run_source or _member(Source, state.get("run_source")),
        signal_report_id=choices.signal_report_id or _text(state, "signal_report_id"),
        runtime_adapter=choices.runtime_adapter or _member(RuntimeAdapter, state.get("runtime_adapter")),
        model=choices.model or _text(state, "model"),
        reasoning_effort=choices.reasoning_effort or _member(Effort, state.get("reasoning_effort")),
        sandbox_environment_id=choices.sandbox_environment_id
        or _uuid(_text(state, "sandbox_environment_id")),
        branch=choices.branch or (_text(state, "pr_base_branch") or "")[:255] or None,
        snapshot_external_id=_text(state, "snapshot_external_id"),
        # Clients cannot change these in the state, so they are as they were checked.
        budget_cost=choices.budget_cost or state.get("budget_cost"),
        budget_tokens=choices.budget_tokens or state.get("budget_tokens"),
        allowed_models=choices.allowed_models or state.get("allowed_models"),
        # An agent that the request names by its adapter is not the one of the run before.
        agent=choices.agent or (None if choices.runtime_adapter else _text(state, "agent")),
    )
    check_effort(merged.runtime_adapter, merged.model, merged.reasoning_effort)
    return merged


def _text(state: Mapping[str, Any], key: str) -> str | None:
    """A text of the state, which clients can set to anything."""
    value = state.get(key)
    return value if isinstance(value, str) and value.strip() else None


def _member(kind: type[E], value: Any) -> str | None:
    return value if isinstance(value, str) and value in set(kind) else None


def _uuid(text: str | None) -> UUID | None:
    try:
        return None if text is None else UUID(text)
    except ValueError:
        return None


def check_runtime(body: RunFields) -> None:
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
    check_effort(adapter, model, effort)


def check_effort(adapter: str | None, model: str | None, effort: str | None) -> None:
    """The table of efforts for each adapter and model."""
    if adapter is None or effort is None or effort in (allowed := allowed_efforts(adapter, model)):
        return
    raise InvalidInputError(
        f"Reasoning effort '{effort}' is not supported for runtime_adapter '{adapter}' and model '{model}'. "
        f"Supported values: {', '.join(allowed) or 'none'}.",
        attr="reasoning_effort",
    )


def state_of(body: RunFields, choices: Choices) -> dict[str, Any]:
    """The `state` of a new run (§3.1): only what somebody chose, besides the mode."""
    state: dict[str, Any] = {"mode": body.mode}
    for name in (
        "pr_authorship_mode",
        "run_source",
        "signal_report_id",
        "runtime_adapter",
        "model",
        "reasoning_effort",
        "agent",
        "snapshot_external_id",
        "budget_cost",
        "budget_tokens",
        "allowed_models",
    ):
        if (value := getattr(choices, name)) is not None:
            state[name] = value
    if body.priority:
        state["priority"] = body.priority
    if body.initial_permission_mode is not None:
        state["initial_permission_mode"] = body.initial_permission_mode
    if choices.runtime_adapter is not None:
        state["provider"] = PROVIDERS[choices.runtime_adapter]
    if choices.branch is not None:
        state["pr_base_branch"] = choices.branch
    if choices.sandbox_environment_id is not None:
        state["sandbox_environment_id"] = str(choices.sandbox_environment_id)
    return state
