"""Calls of models: which model, what it costs, and the end of the budget, in the middle of an answer if need be."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import AsyncIterator, Callable

import h11
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
from taskyard.gateway.prices import MAX_MODEL_NAME, Tokens
from taskyard.gateway.request_body import fields_of, in_background, models_of
from taskyard.gateway.upstream import UpstreamRequest, UpstreamResponse
from taskyard.gateway.usage import Meter, ModelCall

MAX_BODY = 64 * 1024 * 1024
MAX_READ_AHEAD = 32 * 1024 * 1024
"""Bytes of a request whose model has to be known before it may go out; as much as the vendors take."""
MAX_HELD = 4 * MAX_READ_AHEAD
"""Bytes of all such requests of a run at once: the worker's memory is that of other runs, too."""
QUERY = ("beta", "api-version")
"""What a call may have in its query when its model is checked."""
BUDGET = "budget_exceeded"
CLIENT_GONE = 499
"""The status of a call whose client left before the answer began, as nginx has it."""


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
        self._mask = KeyMask()
        self._sent = 0
        self._held = 0
        self._asked: str | None = None
        self._tab = policy.budget.open() if admitted.costs else None
        self._streams = False
        self._before = b""
        self._went_out = False

    async def request(self, head: h11.Request, body: AsyncIterator[bytes] | None) -> UpstreamRequest | Answer:
        method = head.method.decode("ascii")
        sent: AsyncIterator[bytes] | bytes | None = None if body is None else self._counted(body)
        if self._admitted.costs and (self._policy.allowed_models or self._policy.budget.limited):
            sent = await self._read(body)
        self._went_out = True
        return upstream_request(self._admitted, method, head.headers, sent)

    async def _read(self, body: AsyncIterator[bytes] | None) -> bytes:
        """The whole body, checked."""
        whole = bytearray()
        async for chunk in pieces(body):
            whole += chunk
            self._held += len(chunk)
            self._policy.read_ahead.bytes += len(chunk)
            if self._policy.read_ahead.bytes > MAX_HELD:
                message = f"requests of more than {MAX_HELD} bytes are under way at once. Try again later."
                raise RefusedError(Refused(429, message))
            if len(whole) > MAX_READ_AHEAD:
                message = f"the body exceeds {MAX_READ_AHEAD} bytes."
                raise RefusedError(Refused(413, message))
        self._sent = len(whole)
        # Others have spent meanwhile.
        if (refused := check_budget(self._policy)) is not None:
            raise RefusedError(refused)
        return self._check(bytes(whole))

    async def _counted(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in body:
            self._sent += len(chunk)
            yield chunk

    def _check(self, body: bytes) -> bytes:
        try:
            fields = fields_of(body)
            checked = self._policy.allowed_models or self._policy.budget.in_dollars
            models = models_of(fields) if checked else []
        except ValueError as error:
            raise RefusedError(Refused(400, f"the body of a model call {error}.")) from None
        self._asked = models[0] if models else None
        refused = check_query(self._admitted.query)
        for model in dict.fromkeys(models):
            refused = refused or check_model(self._policy, model)
        if refused is None and self._policy.budget.limited and in_background(fields):
            refused = Refused(
                400,
                "a response in the background cannot be counted, and this run has a budget: leave it out.",
            )
        if refused is not None:
            raise RefusedError(refused)
        return msgspec.json.encode(fields)

    def head(self, answer: UpstreamResponse) -> list[Header] | Answer:
        secrets = self._admitted.secrets
        kind = answer.header(b"content-type")
        self._meter = Meter(kind)
        self._streams = kind.lower().startswith("text/event-stream")
        # An error may quote the key that it did not like.
        self._mask = KeyMask(*(secrets if answer.status >= 400 else ()))
        headers = answer_headers(answer.headers, *secrets)
        if self._streams:  # it may end early
            headers = [(name, value) for name, value in headers if name != b"content-length"]
        return headers

    def feed(self, chunk: bytes) -> bytes:
        self._meter.feed(chunk)
        if self._tab is not None and self._streams and self._policy.budget.limited:
            used = self._parts(self._meter.so_far)
            self._tab.tokens = sum(tokens.counted for _, tokens, _ in used)
            self._tab.cost = sum(cost or 0.0 for _, _, cost in used)
            if (reason := self._policy.budget.exceeded) is not None:
                cut = _cut(self._before, chunk)
                if cut is not None:
                    self.stopped = True
                    return chunk[:cut] + error_event(self._admitted.endpoint, reason, BUDGET)
            self._before = (self._before + chunk)[-3:] if len(chunk) < 3 else chunk[-3:]
        return self._mask.feed(chunk)

    def finish(self) -> bytes:
        return self._mask.finish()

    def _parts(self, tokens: Tokens) -> list[tuple[str | None, Tokens, float | None]]:
        """What each model has used and costs, the one that answers first. `tokens`: its own.

        It costs as much as the one that was asked for when nobody knows its price.
        """
        prices = self._policy.prices
        cost = prices.cost(self._meter.model, tokens)
        cost = prices.cost(self._asked, tokens) if cost is None else cost
        others = self._meter.others.items()
        return [(self._meter.model, tokens, cost)] + [
            (model, asked, prices.cost(model, asked)) for model, asked in others
        ]

    def ended(self, status: int, *, complete: bool, seconds: float) -> None:
        if self._tab is None:
            return
        self._policy.read_ahead.bytes -= self._held
        if not self._went_out:
            self._policy.budget.close(self._tab, 0, 0.0)
            return
        self._meter.finish()
        # Vendors charge for a call although nobody waited for its answer.
        charged = 200 <= status < 300 or status == CLIENT_GONE
        used = self._parts(self._meter.total(self._sent if charged else 0))
        self._policy.budget.close(
            self._tab, sum(tokens.counted for _, tokens, _ in used), sum(cost or 0.0 for _, _, cost in used)
        )
        for model, tokens, cost in used:
            self._on_call(
                ModelCall(
                    provider=self._admitted.provider,
                    endpoint=self._admitted.endpoint,
                    model=model,
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
        return masked(text.encode("utf-8", "replace"), *self._admitted.secrets).decode("utf-8", "replace")


def check_budget(policy: Policy) -> Refused | None:
    """Whether a run may still make calls. An agent does not try a 403 again."""
    reason = policy.budget.exceeded
    return None if reason is None else Refused(403, reason, code=BUDGET)


def check_model(policy: Policy, model: str) -> Refused | None:
    """Whether a run may use a model: it is among the allowed ones, and its price is known where money is limited."""
    if len(model) > MAX_MODEL_NAME:
        return Refused(400, f"the name of the model is longer than {MAX_MODEL_NAME} characters.")
    for allowed in policy.allowed_models:
        if not any(fnmatch.fnmatchcase(model, pattern) for pattern in allowed):
            names = ", ".join(allowed) or "none"
            return Refused(403, f"this run may not use the model '{model}'. Allowed: {names}.")
    if policy.budget.in_dollars and policy.prices.of(model) is None:
        return Refused(
            403,
            f"this run has a budget in dollars, and nobody has said what the model '{model}' costs. An "
            "administrator of the server can add its price to the setting models.prices.",
        )
    return None


def check_query(query: str) -> Refused | None:
    """Whether nothing in the query of a call can say its model once more, as some upstreams let it."""
    names = [part.partition("=")[0] for part in re.split("[&;]", query) if part]
    if all(name in QUERY for name in names):
        return None
    return Refused(
        400, f"the query of a model call holds {' and '.join(QUERY)} only while its model is checked."
    )


def _cut(before: bytes, chunk: bytes) -> int | None:
    """Where the last whole event of a chunk ends; None when none does. before: the bytes right before it."""
    data = before + chunk
    ends = [found + len(mark) for mark in (b"\n\n", b"\r\n\r\n", b"\r\r") if (found := data.rfind(mark)) >= 0]
    at = max(ends, default=-1) - len(before)
    return at if at >= 0 else None


def refusal_body(provider: str | None, refused: Refused) -> bytes:
    return error_body(provider, refused.status, refused.message, refused.code)
