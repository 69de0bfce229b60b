"""Token counts from the bytes of answers, however they are cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskyard.gateway.prices import Tokens
from taskyard.gateway.usage import Meter, ModelCall, SseParser, Usage

# Shortened from the APIs' streaming documentation: the usage objects are whole.
ANTHROPIC_STREAM = b"""event: message_start
data: {"type":"message_start","message":{"id":"msg_01","type":"message","role":"assistant",\
"model":"claude-sonnet-4-5-20250929","content":[],"stop_reason":null,"stop_sequence":null,\
"usage":{"input_tokens":2679,"cache_creation_input_tokens":310,"cache_read_input_tokens":12000,\
"cache_creation":{"ephemeral_5m_input_tokens":310,"ephemeral_1h_input_tokens":0},"output_tokens":3,\
"service_tier":"standard"}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: ping
data: {"type": "ping"}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\\"usage\\":\
 {\\"output_tokens\\": 9}"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},\
"usage":{"output_tokens":510,"cache_read_input_tokens":null}}

event: message_stop
data: {"type":"message_stop"}

"""
ANTHROPIC = {
    "model": "claude-sonnet-4-5-20250929",
    "input_tokens": 2679,
    "output_tokens": 510,
    "cached_read_tokens": 12000,
    "cached_write_tokens": 310,
    "metered": True,
}

RESPONSES_STREAM = b"""event: response.created
data: {"type":"response.created","sequence_number":0,"response":{"id":"resp_1","object":"response",\
"status":"in_progress","model":"gpt-5.5-2026-04-01","output":[],"usage":null}}

event: response.output_text.delta
data: {"type":"response.output_text.delta","item_id":"msg_1","output_index":0,"content_index":0,"delta":"Hi"}

event: response.completed
data: {"type":"response.completed","sequence_number":2,"response":{"id":"resp_1","object":"response",\
"status":"completed","model":"gpt-5.5-2026-04-01","output":[{"type":"message","id":"msg_1","role":"assistant",\
"content":[{"type":"output_text","text":"Hi","annotations":[]}]}],"usage":{"input_tokens":3700,\
"input_tokens_details":{"cached_tokens":3072},"output_tokens":211,"output_tokens_details":{"reasoning_tokens":128},\
"total_tokens":3911}}}

"""
RESPONSES = {
    "model": "gpt-5.5-2026-04-01",
    "input_tokens": 628,
    "output_tokens": 211,
    "cached_read_tokens": 3072,
    "cached_write_tokens": 0,
    "metered": True,
}

CHAT_STREAM = b"""data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"gpt-4o-mini",\
"choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}],"usage":null}

data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"gpt-4o-mini","choices":[],\
"usage":{"prompt_tokens":25,"completion_tokens":7,"total_tokens":32,"prompt_tokens_details":{"cached_tokens":5}}}

data: [DONE]

"""
CHAT = {
    "model": "gpt-4o-mini",
    "input_tokens": 20,
    "output_tokens": 7,
    "cached_read_tokens": 5,
    "cached_write_tokens": 0,
    "metered": True,
}

STREAMS = pytest.mark.parametrize(
    ("stream", "expected"),
    [
        pytest.param(ANTHROPIC_STREAM, ANTHROPIC, id="anthropic"),
        pytest.param(RESPONSES_STREAM, RESPONSES, id="responses"),
        pytest.param(CHAT_STREAM, CHAT, id="chat"),
    ],
)
LINE_ENDS = pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])


def read(*chunks: bytes, content_type: str = "text/event-stream; charset=utf-8") -> dict[str, object]:
    meter = Meter(content_type)
    for chunk in chunks:
        meter.feed(chunk)
    meter.finish()
    told = {name: value for name, value in vars(meter).items() if not name.startswith("_")}
    return told if told["others"] else {name: value for name, value in told.items() if name != "others"}


@STREAMS
@LINE_ENDS
def test_a_stream_cut_at_every_byte(stream: bytes, expected: dict[str, object], line_end: bytes) -> None:
    stream = stream.replace(b"\n", line_end)
    for cut in range(len(stream) + 1):
        assert read(stream[:cut], stream[cut:]) == expected, cut


@STREAMS
@LINE_ENDS
def test_a_stream_byte_by_byte(stream: bytes, expected: dict[str, object], line_end: bytes) -> None:
    stream = stream.replace(b"\n", line_end)
    assert read(*(stream[i : i + 1] for i in range(len(stream)))) == expected


@STREAMS
def test_the_last_event_counts_without_its_blank_line(stream: bytes, expected: dict[str, object]) -> None:
    assert read(stream.rstrip(b"\n")) == expected


def test_a_stream_that_breaks_off_keeps_what_it_told() -> None:
    broken = ANTHROPIC_STREAM[: ANTHROPIC_STREAM.index(b'"output_tokens":510')]
    assert read(broken) == {**ANTHROPIC, "output_tokens": 3}


def test_whole_answers() -> None:
    anthropic = {
        "type": "message",
        "model": "claude-x",
        "content": [{"type": "tool_use", "name": "t", "input": {"usage": {"input_tokens": 99}}}],
        "usage": {
            "input_tokens": 1,
            "output_tokens": 2,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": 4,
        },
    }
    got = read(json.dumps(anthropic).encode(), content_type="application/json")
    assert got == {
        "model": "claude-x",
        "input_tokens": 1,
        "output_tokens": 2,
        "cached_read_tokens": 3,
        "cached_write_tokens": 4,
        "metered": True,
    }
    response = json.loads(RESPONSES_STREAM.split(b"data: ")[-1])["response"]
    text = json.dumps(response, indent=1).encode()
    assert read(text[:50], text[50:], content_type="application/json") == RESPONSES


def test_models_that_were_asked_within_a_call() -> None:
    """An advisor is counted by itself, steps that the sums leave out with the others; the newest list counts."""

    def step(kind: str, fresh: int, out: int, read: int = 0, **more: Any) -> dict[str, Any]:
        return {
            "type": kind,
            "input_tokens": fresh,
            "output_tokens": out,
            "cache_read_input_tokens": read,
            **more,
        }

    def event(kind: str, steps: list[Any]) -> bytes:
        usage = {"input_tokens": 2, "output_tokens": 49, "cache_read_input_tokens": 220, "iterations": steps}
        if kind == "message_start":
            data: dict[str, Any] = {"type": kind, "message": {"model": "claude-a", "usage": usage}}
        else:
            data = {"type": kind, "usage": usage}
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()

    advice = step("advisor_message", 1500, 70, 9, model="claude-big", cache_creation_input_tokens=8)
    steps: list[Any] = [step("message", 1, 5, 100), advice, step("message", 1, 44, 120)]
    counts = {"model": "claude-a", "input_tokens": 2, "output_tokens": 49, "cached_read_tokens": 220}
    whole = {**counts, "cached_write_tokens": 0, "metered": True}
    once = {"claude-big": Tokens(1500, 70, 9, 8)}
    stream = (
        event("message_start", steps[:1]),
        event("message_delta", steps[:2]),
        event("message_delta", steps),
    )
    assert read(*stream) == {**whole, "others": once}
    # A second step of the advisor, a summary that is in no sum, one that does not say which model, and nonsense.
    steps += [advice, step("compaction", 900, 100), step("advisor_message", 1, 1), 7]
    more = {**whole, "input_tokens": 902, "output_tokens": 149}
    found = {"claude-big": Tokens(3000, 140, 18, 16), "unknown": Tokens(1, 1)}
    assert read(*stream, event("message_delta", steps)) == {**more, "others": found}
    body = json.dumps({"type": "message", "model": "claude-a", "usage": {"iterations": steps}}).encode()
    assert read(body, content_type="application/json") == {**more, "others": found}


def test_cache_writes_of_openai_are_not_input_twice() -> None:
    usage = {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 30},
        "output_tokens": 1,
    }
    got = read(json.dumps({"model": "m", "usage": usage}).encode(), content_type="application/json")
    assert (got["input_tokens"], got["cached_read_tokens"], got["cached_write_tokens"]) == (50, 20, 30)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[1]",
        b'{"usage": 3}',
        b'{"error": {"message": "no"}}',
        b"[" * 100_000,
        b'{"message": "overloaded"}',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream", ""])
def test_what_is_no_usage_is_not_counted(body: bytes, content_type: str) -> None:
    data = b"data: " + body if content_type == "text/event-stream" else body
    got = read(data, content_type=content_type)
    assert not got["metered"]
    assert got["input_tokens"] == got["output_tokens"] == 0


def test_nonsense_numbers_are_not_counted() -> None:
    usage = {"input_tokens": -5, "output_tokens": True, "cache_read_input_tokens": "7"}
    got = read(json.dumps({"usage": usage}).encode(), content_type="application/json")
    assert (got["input_tokens"], got["output_tokens"], got["cached_read_tokens"]) == (0, 0, 0)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)


@given(
    events=st.lists(st.lists(TEXTS, min_size=1, max_size=3), max_size=5),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    data=st.data(),
)
def test_sse_round_trip(events: list[list[str]], line_end: bytes, data: st.DataObject) -> None:
    stream = b"".join(
        b"".join(b"data: " + line.encode() + line_end for line in lines) + b": comment" + line_end + line_end
        for lines in events
    )
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    edges = [0, *sorted(cuts), len(stream)]
    parser = SseParser()
    got = [e for a, b in pairwise(edges) for e in parser.feed(stream[a:b])]
    got += parser.feed(b"\n")  # a CR that ends the stream is held until something follows
    assert got == ["\n".join(lines).encode() for lines in events]


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_event_above_the_limit_is_left_out(step: int) -> None:
    parser = SseParser(limit=50)
    stream = b"data: a\n\ndata: " + b"x" * 100 + b"\ndata: tail\n\ndata: b\n\n"
    got = [e for i in range(0, len(stream), step) for e in parser.feed(stream[i : i + step])]
    assert got == [b"a", b"b"]


def test_sums_and_sums_per_model() -> None:
    usage = Usage()
    for model, tokens in (("a", 1), ("b", 10), ("a", 100), (None, 1000)):
        usage.add(
            ModelCall(
                provider="openai",
                endpoint="/v1/responses",
                model=model,
                status=200,
                complete=True,
                metered=True,
                seconds=0.1,
                input_tokens=tokens,
                output_tokens=tokens * 2,
                cached_read_tokens=tokens * 3,
                cached_write_tokens=tokens * 4,
            )
        )
    assert (usage.calls, usage.input_tokens, usage.output_tokens) == (4, 1111, 2222)
    assert (usage.cached_read_tokens, usage.cached_write_tokens) == (3333, 4444)
    assert {name: (u.calls, u.input_tokens) for name, u in usage.models.items()} == {
        "a": (2, 101),
        "b": (1, 10),
        "unknown": (1, 1000),
    }
