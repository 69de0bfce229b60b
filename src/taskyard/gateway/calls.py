"""Calls of models: which model, what it costs, and the end of the budget, in the middle of an answer if need be."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import h11
import httpx
import msgspec

from taskyard.gateway.exchange import Answer, Exchange, RefusedError, pieces
from taskyard.gateway.headers import Header
from taskyard.gateway.models import (
    Admitted,
    KeyMask,
    Refused,
    answer_headers,
    error_body,
    error_event,
    masked,
    upstream_request,
)
from taskyard.gateway.policy import Policy
from taskyard.gateway.usage import Meter, ModelCall

MAX_BODY = 64 * 1024 * 1024
MAX_READ_AHEAD = 32 * 1024 * 1024
"""Bytes of a request whose model has to be known before it may go out; as much as the vendors take."""
BUDGET = "budget_exceeded"


class CallExchange(Exchange):
    """One request to a model API. Tells `on_call` of it if it costs tokens."""

    max_body = MAX_BODY

    def __init__(self, admitted: Admitted, policy: Policy, on_call: Callable[[ModelCall], None]) -> None:
        self.name = f"the {admitted.provider} API"
        self.upstream = admitted.route.base_url
        self._admitted = admitted
        self._policy = policy
        self._on_call = on_call
        self._meter = Meter("")
        self._mask = KeyMask(None)
        self._sent = 0
        self._asked: str | None = None
        self._tab = policy.budget.open() if admitted.costs else None
        self._streams = False

    async def request(self, head: h11.Request, body: AsyncIterator[bytes] | None) -> httpx.Request | Answer:
        method = head.method.decode("ascii")
        if not self._admitted.costs or not self._model_matters:
            return upstream_request(
                self._admitted, method, head.headers, None if body is None else self._counted(body)
            )
        whole = bytearray()
        async for chunk in pieces(body):
            whole += chunk
            if len(whole) > MAX_READ_AHEAD:
                message = f"the body exceeds {MAX_READ_AHEAD} bytes."
                raise RefusedError(Refused(413, message))
        self._sent = len(whole)
        self._asked = self._allowed_model(bytes(whole))
        return upstream_request(self._admitted, method, head.headers, bytes(whole))

    @property
    def _model_matters(self) -> bool:
        return bool(self._policy.allowed_models) or self._policy.budget.in_dollars

    async def _counted(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in body:
            self._sent += len(chunk)
            yield chunk

    def _allowed_model(self, body: bytes) -> str:
        try:
            model = model_of(body)
        except ValueError as error:
            raise RefusedError(Refused(400, f"the body of a model call {error}.")) from None
        refused = check_model(self._policy, model)
        if refused is not None:
            raise RefusedError(refused)
        return model

    def head(self, answer: httpx.Response) -> list[Header] | Answer:
        key = self._admitted.key
        kind = answer.headers.get("content-type", "")
        self._meter = Meter(kind)
        self._streams = kind.lower().startswith("text/event-stream")
        # An error may quote the key that it did not like.
        self._mask = KeyMask(key if answer.status_code >= 400 else None)
        return answer_headers(answer.headers.raw, key)

    def feed(self, chunk: bytes) -> bytes:
        self._meter.feed(chunk)
        if self._tab is not None and self._streams and self._policy.budget.limited:
            tokens = self._meter.so_far
            self._tab.tokens = tokens.counted
            self._tab.cost = self._policy.prices.cost(self._model, tokens) or 0.0
            if (reason := self._policy.budget.exceeded) is not None and (cut := _cut(chunk)) is not None:
                self.stopped = True
                return chunk[:cut] + error_event(self._admitted.endpoint, reason, BUDGET)
        return self._mask.feed(chunk)

    def finish(self) -> bytes:
        return self._mask.finish()

    @property
    def _model(self) -> str | None:
        return self._meter.model or self._asked

    def ended(self, status: int, *, complete: bool, seconds: float) -> None:
        if self._tab is None:
            return
        self._meter.finish()
        began = 200 <= status < 300
        tokens = self._meter.total(self._sent if began else 0)
        cost = self._policy.prices.cost(self._model, tokens)
        self._policy.budget.close(self._tab, tokens, cost)
        self._on_call(
            ModelCall(
                provider=self._admitted.provider,
                endpoint=self._admitted.endpoint,
                model=self._meter.model,
                status=status,
                complete=complete,
                metered=self._meter.metered,
                seconds=seconds,
                input_tokens=tokens.input,
                output_tokens=tokens.output,
                cached_read_tokens=tokens.cache_read,
                cached_write_tokens=tokens.cache_write,
                cost=cost,
            )
        )

    def masked(self, text: str) -> str:
        return masked(text.encode("utf-8", "replace"), self._admitted.key).decode("utf-8", "replace")


def check_budget(policy: Policy) -> Refused | None:
    """Whether a run may still make calls. An agent does not try a 403 again."""
    reason = policy.budget.exceeded
    return None if reason is None else Refused(403, reason, code=BUDGET)


def check_model(policy: Policy, model: str) -> Refused | None:
    """Whether a run may use a model: it is among the allowed ones, and its price is known where money is limited."""
    for allowed in policy.allowed_models:
        if not any(fnmatch.fnmatchcase(model, pattern) for pattern in allowed):
            names = ", ".join(allowed) or "none"
            return Refused(403, f"this run may not use the model '{model[:100]}'. Allowed: {names}.")
    if policy.budget.in_dollars and policy.prices.of(model) is None:
        return Refused(
            403,
            f"this run has a budget in dollars, and nobody has said what the model '{model[:100]}' costs. An "
            "administrator of the server can add its price to the setting models.prices.",
        )
    return None


def model_of(body: bytes) -> str:
    """The `model` that a request names, whichever parser reads it. Raises ValueError; the text says why.

    Twice the same key, or two that differ in case only, mean one thing to one parser and another to the next, so
    such a body is refused.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("is no JSON object") from None
    if [name for name in fields if name.casefold() == "model"] != ["model"]:
        raise ValueError("does not name its model, or names several")
    # A body as programs write it has nothing but its fields, and so no room for one that was overwritten.
    known = 2 + sum(
        len(json.dumps(name, ensure_ascii=False).encode()) + len(raw) + 2 for name, raw in fields.items()
    )
    if len(body) != known - 1:
        _refuse_repeated(body)
    try:
        return msgspec.json.decode(fields["model"], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ValueError("names a model that is no text") from None


def _refuse_repeated(body: bytes) -> None:
    def names(pairs: list[tuple[str, Any]]) -> list[str]:
        return [name for name, _ in pairs]

    try:
        found = json.loads(body, object_pairs_hook=names)
    except (ValueError, RecursionError):
        raise ValueError("is no JSON object") from None
    if not isinstance(found, list) or len(set(found)) != len(found):
        raise ValueError("has a field twice")


def _cut(chunk: bytes) -> int | None:
    """Where the last whole event of a chunk ends; None when none does."""
    ends = [at + len(mark) for mark in (b"\n\n", b"\r\n\r\n", b"\r\r") if (at := chunk.rfind(mark)) >= 0]
    return max(ends, default=None)


def refusal_body(provider: str | None, refused: Refused) -> bytes:
    return error_body(provider, refused.status, refused.message, refused.code)
