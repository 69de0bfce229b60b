"""Counting tokens from what passes by.

A `Meter` is fed the bytes of an answer as they are forwarded and never holds them up. It reads Anthropic Messages,
OpenAI Responses and OpenAI Chat Completions, streamed (server-sent events) or whole.

One meaning for all APIs: `input_tokens` are the tokens that were neither read from nor written to the prompt
cache. Anthropic reports them so; OpenAI's number includes the cached ones, which are taken off here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from taskyard.gateway.prices import MAX_MODEL_NAME, Tokens

MAX_EVENT = 32 * 1024 * 1024
"""Bytes of one server-sent event or one JSON answer that are looked at; a larger one goes uncounted."""

UNKNOWN_MODEL = "unknown"
OTHER_MODELS = "other"
MAX_MODELS = 50
_BYTES_A_TOKEN = 4
_USUAL_CONTEXT = 200_000


@dataclass(frozen=True)
class ModelCall:
    """One call of a model, finished, failed or broken off."""

    provider: str
    endpoint: str
    """The path within the API, such as `/v1/messages`."""
    model: str | None
    """As the answer names it."""
    status: int
    """HTTP status; 502 when the API could not be reached, 499 when the agent left before the answer began."""
    complete: bool
    """The answer was forwarded to its end."""
    metered: bool
    """The answer told its usage. Else the counts are 0, or estimated for a call that is charged (see `Meter`)."""
    seconds: float
    input_tokens: int = 0
    output_tokens: int = 0
    cached_read_tokens: int = 0
    cached_write_tokens: int = 0
    cost: float | None = None
    """US dollars; None when the model's price is not known."""


@dataclass
class Usage:
    """Sums over the calls of one run."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_read_tokens: int = 0
    cached_write_tokens: int = 0
    cost: float = 0.0
    """US dollars."""
    unpriced_calls: int = 0
    """Calls with tokens whose model has no known price; `cost` is without them."""
    models: dict[str, Usage] = field(default_factory=dict)
    """The same per model: `unknown` for answers that name none, `other` beyond MAX_MODELS, since some upstreams take
    any name from an agent and give it back."""

    def add(self, call: ModelCall) -> None:
        counted = (
            call.input_tokens or call.output_tokens or call.cached_read_tokens or call.cached_write_tokens
        )
        one = Usage(
            1, call.input_tokens, call.output_tokens, call.cached_read_tokens, call.cached_write_tokens,
            call.cost or 0.0, 1 if call.cost is None and counted else 0,
        )  # fmt: skip
        self.merge(one)
        self.add_model(call.model, one)

    def add_model(self, model: str | None, part: Usage) -> None:
        """Add sums to those of one model; the sums of all are left alone."""
        name = (model or UNKNOWN_MODEL)[:MAX_MODEL_NAME]
        if name not in self.models and len(self.models) >= MAX_MODELS:
            name = OTHER_MODELS
        self.models.setdefault(name, Usage()).merge(part)

    def merge(self, other: Usage) -> None:
        """Add the sums of others, not their models."""
        self.calls += other.calls
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cached_read_tokens += other.cached_read_tokens
        self.cached_write_tokens += other.cached_write_tokens
        self.cost += other.cost
        self.unpriced_calls += other.unpriced_calls


class Meter:
    """Reads the usage of one answer.

    Usage may come in parts (Anthropic tells the input at the start and the output at the end, both as totals so
    far); of each number the last one counts.

    Some answers never tell it: those that are broken off, and streamed chats that were not asked to. Whoever sends
    many such must not go past a budget, so `tokens` is then estimated: a token for each piece of text, and one for
    every four bytes of the request, up to what a usual model takes at all.
    """

    def __init__(self, content_type: str) -> None:
        self.model: str | None = None
        self.metered = False
        self.input_tokens = self.output_tokens = self.cached_read_tokens = self.cached_write_tokens = 0
        self.others: dict[str, Tokens] = {}
        """What other models have used that were asked within the call."""
        self._cached_write_1h = 0
        self._pieces = 0
        self._ended = False
        self._stream = SseParser() if content_type.lower().startswith("text/event-stream") else None
        self._whole = bytearray()

    @property
    def so_far(self) -> Tokens:
        """What the answer has used up to here, as far as it is known."""
        output = self.output_tokens if self._ended else max(self.output_tokens, self._pieces)
        return Tokens(
            self.input_tokens,
            output,
            self.cached_read_tokens,
            self.cached_write_tokens,
            self._cached_write_1h,
        )

    def total(self, request_bytes: int) -> Tokens:
        """What the whole call has used, after `finish`; estimated where it was not told."""
        tokens = self.so_far
        if self.metered:
            return tokens
        return replace(tokens, input=min(request_bytes // _BYTES_A_TOKEN, _USUAL_CONTEXT))

    def feed(self, chunk: bytes) -> None:
        if self._stream is not None:
            for event in self._stream.feed(chunk):
                self._event(event)
        elif len(self._whole) <= MAX_EVENT:
            self._whole += chunk

    def finish(self) -> None:
        """The answer has ended or broken off. A last event counts even without its closing blank line."""
        self.feed(b"\n\n")
        if self._stream is None and len(self._whole) <= MAX_EVENT:
            self._read(bytes(self._whole))
        self._whole.clear()

    def _event(self, data: bytes) -> None:
        # Most events are small deltas; parse the few that can matter.
        if b'delta"' in data:
            self._pieces += 1
        if b'"usage"' in data or (self.model is None and b'"model"' in data):
            self._read(data)

    def _read(self, data: bytes) -> None:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(document, dict):
            return
        # Anthropic's first event wraps a `message`, OpenAI's events wrap a `response`.
        inner = document.get("message") or document.get("response")
        for holder in (document, inner) if isinstance(inner, dict) else (document,):
            self.model = _name(holder.get("model")) or self.model
            if isinstance(usage := holder.get("usage"), dict):
                self._usage(usage)
                # Anthropic's first event tells an output of a token or so; every other number is a total.
                self._ended = self._ended or document.get("type") != "message_start"

    def _usage(self, usage: dict[str, Any]) -> None:
        details = usage.get("input_tokens_details") or usage.get("prompt_tokens_details")
        if isinstance(details, dict) or "prompt_tokens" in usage:
            details = details if isinstance(details, dict) else {}
            self.cached_read_tokens = _count(details.get("cached_tokens"), 0)
            self.cached_write_tokens = _count(details.get("cache_write_tokens"), 0)
            total = _count(usage.get("input_tokens"), _count(usage.get("prompt_tokens"), 0))
            self.input_tokens = max(0, total - self.cached_read_tokens - self.cached_write_tokens)
            self.output_tokens = _count(usage.get("output_tokens"), _count(usage.get("completion_tokens"), 0))
        else:
            before = (
                self.input_tokens,
                self.output_tokens,
                self.cached_read_tokens,
                self.cached_write_tokens,
            )
            self._take(_anthropic(usage, Tokens(*before, self._cached_write_1h)))
            if isinstance(parts := usage.get("iterations"), list):
                self._iterations(parts)
        self.metered = True

    def _take(self, tokens: Tokens) -> None:
        self.input_tokens, self.output_tokens = tokens.input, tokens.output
        self.cached_read_tokens, self.cached_write_tokens = tokens.cache_read, tokens.cache_write
        self._cached_write_1h = tokens.cache_write_1h

    def _iterations(self, parts: list[Any]) -> None:
        """Anthropic's list of all steps within a call, up to now.

        The numbers beside the list are without the steps of other models (an advisor) and some of its own (compaction).
        """
        own = Tokens()
        self.others = {}
        for part in parts:
            if not isinstance(part, dict):
                continue
            tokens, name = _anthropic(part, Tokens()), _name(part.get("model"))
            if name is None:
                name = UNKNOWN_MODEL if part.get("type") == "advisor_message" else self.model
            if name is None or name == self.model:
                own += tokens
            else:
                name = name if name in self.others or len(self.others) < MAX_MODELS else OTHER_MODELS
                self.others[name] = self.others.get(name, Tokens()) + tokens
        told = (self.input_tokens, self.output_tokens, self.cached_read_tokens, self.cached_write_tokens)
        pairs = zip((*told, self._cached_write_1h), astuple(own), strict=True)
        self._take(Tokens(*(max(pair) for pair in pairs)))


def _anthropic(usage: dict[str, Any], before: Tokens) -> Tokens:
    """The numbers of a usage; those of before where it does not tell one."""
    write = _count(usage.get("cache_creation_input_tokens"), before.cache_write)
    long, kinds = before.cache_write_1h, usage.get("cache_creation")
    if isinstance(kinds, dict):
        long = min(_count(kinds.get("ephemeral_1h_input_tokens"), long), write)
    return Tokens(
        _count(usage.get("input_tokens"), before.input),
        _count(usage.get("output_tokens"), before.output),
        _count(usage.get("cache_read_input_tokens"), before.cache_read),
        write,
        long,
    )


def _name(value: Any) -> str | None:
    """A model's name as the database takes it: an upstream may give back whatever an agent called it."""
    if not isinstance(value, str) or not value:
        return None
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _count(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


class SseParser:
    """Splits a byte stream into the data of server-sent events.

    Rules: the HTML standard, "9.2.6 Interpreting an event stream"; lines end with LF, CR LF or CR. Event names and
    ids are of no use here.
    """

    _LINE_END = re.compile(rb"\r\n|\n|\r")

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self._limit = limit
        self._held = b""  # a CR at the end of a chunk, which an LF may follow
        self._line: list[bytes] = []  # pieces of the unfinished line
        self._data: list[bytes] = []
        self._size = 0  # of the unfinished event

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of each event that ends in this chunk; events above the limit are left out."""
        chunk = self._held + chunk
        self._held = b"\r" if chunk.endswith(b"\r") else b""
        first, *others = self._LINE_END.split(chunk[: len(chunk) - len(self._held)])
        self._piece(first)
        for other in others:
            line = b"".join(self._line)
            self._line.clear()
            if not line:
                if self._data and self._size <= self._limit:
                    yield b"\n".join(self._data)
                self._data.clear()
                self._size = 0
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            self._piece(other)

    def _piece(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            # Keep something, so that the line is not taken for the blank one that ends the event.
            self._data, self._line = [], [b":"] if piece or self._line else []
        elif piece:
            self._line.append(piece)
