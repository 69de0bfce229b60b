"""The gateway of a run: its policy out of settings, environment and run, and what it tells, as entries and state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog

from taskyard.db.engine import AWAY, Database, Row, raise_cancelled
from taskyard.drive.failures import RunFailure
from taskyard.drive.recorder import Recorder
from taskyard.environments import domains
from taskyard.errors import SetupError
from taskyard.events import entries
from taskyard.gateway import store
from taskyard.gateway.prices import BUILT_IN
from taskyard.gateway.server import (
    Budget,
    Gateway,
    GitRepository,
    ModelCall,
    ModelRoute,
    Network,
    Policy,
    Refusal,
    Tool,
    Usage,
)
from taskyard.settings import KEY_VARIABLES, BudgetSettings, Settings, Upstream

Json = dict[str, Any]

MAX_REFUSALS = 200
FLUSH_S = 15.0
"""A gateway that closes waits this long for its calls to be written."""

log = structlog.get_logger()


async def open_gateway(
    settings: Settings,
    database: Database,
    row: Row,
    environment: Row | None,
    recorder: Recorder,
    *,
    git: Sequence[GitRepository] = (),
    tools: Sequence[Tool] = (),
    on_budget: Callable[[str], None] | None = None,
) -> Gateway:
    """The gateway of a run, with what earlier workers of it have used already counted.

    environment: its sandbox environment, which the caller has checked. git: the repositories that it may use.
    tools: of the server's own, that the agent may call.
    on_budget: called once, with a sentence, when the budget is used up.
    Raises RunFailure: agent_start_failed for settings that cannot work.
    """
    run_id, project_id = row["id"], row["project_id"]
    try:
        models, prices = routes(settings), BUILT_IN.extended(settings.models.prices)
    except SetupError as error:
        raise RunFailure("agent_start_failed", error.detail) from error
    usage = await store.usage_of(database, run_id)
    spent_month = 0.0
    if settings.budget.project_month_cost is not None:
        spent_month = await store.project_cost_this_month(database, project_id)
    network = domains.network(settings, environment)
    site, asked = settings.models.allowed, row["state"].get("allowed_models")
    policy = Policy(
        str(run_id),
        models,
        network,
        git,
        [list(names) for names in (site, asked) if names is not None],
        budget_of(settings.budget, row["state"], usage, spent_month),
        prices,
        tools=tools,
    )
    if note := network_note(network, environment):
        recorder.add(entries.console(str(run_id), "info", note))
    calls = CallLog(database, run_id, project_id)

    def on_usage(call: ModelCall) -> None:
        recorder.add(used(str(run_id), call))
        calls.add(call)

    return Gateway(
        policy,
        on_refusal=Refusals(str(run_id), recorder),
        on_usage=on_usage,
        on_budget=on_budget,
        usage=usage,
        on_close=calls.close,
    )


def budget_of(limits: BudgetSettings, state: Json, usage: Usage, spent_month: float = 0.0) -> Budget:
    """What a run may spend: what it asks for, else the site's default, and never more than the site's maximum.

    spent_month: US dollars of its whole project this month, this run included.
    """
    spent_tokens = usage.input_tokens + usage.output_tokens + usage.cached_write_tokens
    costs = [state.get("budget_cost") or limits.cost, limits.max_cost]
    tokens = [state.get("budget_tokens") or limits.tokens, limits.max_tokens]
    return Budget(
        min((cost for cost in costs if cost is not None), default=None),
        min((count for count in tokens if count is not None), default=None),
        spent_cost=usage.cost,
        spent_tokens=spent_tokens,
        project_month_cost=limits.project_month_cost,
        spent_month=spent_month,
    )


def routes(settings: Settings) -> dict[str, ModelRoute]:
    """Where model traffic goes. Raises RunFailure, SetupError."""
    return {
        name: _route(name, getattr(settings.models, name), variable)
        for name, variable in KEY_VARIABLES.items()
    }


def _route(name: str, upstream: Upstream, variable: str) -> ModelRoute:
    try:
        key = upstream.key(variable)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        message = f"The file of the setting models.{name}.api_key_file cannot be read: {reason}."
        raise RunFailure("agent_start_failed", message) from error
    headers = {header: value.get_secret_value() for header, value in upstream.headers.items()}
    renewed = upstream.api_key is None and upstream.api_key_file is not None
    return ModelRoute(
        upstream.base_url,
        (lambda: upstream.key(variable)) if renewed else key,
        upstream.auth,
        upstream.version,
        headers,
        upstream.query,
    )


def network_note(network: Network, environment: Row | None) -> str | None:
    if environment is None:
        return None
    name, level = environment["name"], environment["network_access_level"]
    text = f"The sandbox environment '{name}' gives network access '{level}'"
    if network.level == "listed":
        text += f" to {len(network.rules)} hosts"
    text += "." if network.rules or network.level != "listed" else ": the model APIs and the repository only."
    if ignored := network.rules.ignored:
        text += f" Ignored, because they are no host names: {', '.join(ignored[:20])}."
    return text


class CallLog:
    """Writes a run's calls of models to the database, in order; keeps trying while it is away."""

    def __init__(self, database: Database, run_id: UUID, project_id: int) -> None:
        self._database = database
        self._run_id = run_id
        self._project_id = project_id
        self._waiting: list[ModelCall] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, call: ModelCall) -> None:
        self._waiting.append(call)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write(), name=f"model calls {self._run_id}")

    async def close(self) -> None:
        """Wait until all is written, for a bounded time."""
        if self._task is None:
            return
        await asyncio.wait({self._task}, timeout=FLUSH_S)
        if not self._task.done():
            log.warning("calls of models were not written", run=str(self._run_id), calls=len(self._waiting))
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _write(self) -> None:
        delay = 0.1
        while batch := self._waiting[:500]:
            try:
                await store.add(self._database, self._run_id, self._project_id, batch)
            except AWAY:
                raise_cancelled()
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)
                continue
            except Exception:  # a bug: the run goes on, its state still has the sums
                log.exception("writing calls of models failed", run=str(self._run_id))
            del self._waiting[: len(batch)]


class Refusals:
    """Shows what the gateway refused: each thing once, and not without end, since the agent decides how often."""

    def __init__(self, run_id: str, recorder: Recorder) -> None:
        self._run_id = run_id
        self._recorder = recorder
        self._seen: set[tuple[str, str, str]] = set()

    def __call__(self, refusal: Refusal) -> None:
        key = (refusal.method, refusal.target, refusal.reason)
        if key in self._seen or len(self._seen) >= MAX_REFUSALS:
            return
        self._seen.add(key)
        text = f"Network: refused {refusal.method} {refusal.target}: {refusal.reason}"
        if len(self._seen) == MAX_REFUSALS:
            text += " (further refusals are not shown)"
        self._recorder.add(entries.console(self._run_id, "warn", text))


def spending(usage: Usage) -> Json:
    """What a run has used of models, as keys of its state: `token_usage` and, in US dollars, `cost`."""
    return {"token_usage": usage_state(usage), "cost": _dollars(usage)}


def usage_state(usage: Usage) -> Json:
    """The counted model traffic, as it stands in a run's `state.token_usage`."""
    counts: Json = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_read_tokens": usage.cached_read_tokens,
        "cached_write_tokens": usage.cached_write_tokens,
        "model_calls": usage.calls,
        "cost": _dollars(usage),
    }
    if usage.unpriced_calls:
        counts["unpriced_calls"] = usage.unpriced_calls
    if usage.models:
        counts["models"] = {name: usage_state(one) for name, one in usage.models.items()}
    return counts


def _dollars(usage: Usage) -> float:
    return round(usage.cost, 6)


def used(run_id: str, call: ModelCall) -> entries.Entry:
    counts = {
        "inputTokens": call.input_tokens,
        "outputTokens": call.output_tokens,
        "cachedReadTokens": call.cached_read_tokens,
        "cachedWriteTokens": call.cached_write_tokens,
    }
    cost = None if call.cost is None else round(call.cost, 6)
    return entries.named(
        "_posthog/usage_update", {"sessionId": run_id, "used": counts, "model": call.model, "cost": cost}
    )


@dataclass(frozen=True)
class BudgetEnd:
    """How a run ends that has used up its budget."""

    status: str
    message: str


def budget_end(settings: Settings, reason: str) -> BudgetEnd:
    """As the site has set it; `reason` is the gateway's `over_budget`."""
    advice = " What was done so far is kept: start another run that resumes this one, with a higher budget, to go on."
    return BudgetEnd(settings.budget.end, reason[:1].upper() + reason[1:] + advice)
