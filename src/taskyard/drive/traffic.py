"""What the gateway tells of a run's traffic, as entries and state of the run."""

from __future__ import annotations

from typing import Any

from taskyard.drive.recorder import Recorder
from taskyard.events import entries
from taskyard.gateway.server import ModelCall, Refusal, Usage

Json = dict[str, Any]

MAX_REFUSALS = 200


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


def usage_state(usage: Usage) -> Json:
    """The counted model traffic, as it stands in a run's `state.token_usage`."""
    counts: Json = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_read_tokens": usage.cached_read_tokens,
        "cached_write_tokens": usage.cached_write_tokens,
        "model_calls": usage.calls,
    }
    if usage.models:
        counts["models"] = {name: usage_state(one) for name, one in usage.models.items()}
    return counts


def used(run_id: str, call: ModelCall) -> entries.Entry:
    counts = {
        "inputTokens": call.input_tokens,
        "outputTokens": call.output_tokens,
        "cachedReadTokens": call.cached_read_tokens,
        "cachedWriteTokens": call.cached_write_tokens,
    }
    return entries.named("_posthog/usage_update", {"sessionId": run_id, "used": counts, "model": call.model})
