"""The wire forms of the scripted model endpoint: Anthropic Messages, OpenAI Responses, Chat Completions.

For each: `*_turns` reads a request into turns, `*_events` gives the events of a streamed answer,
`*_body` the whole answer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

# Reported by every answer, so that tests can check sums. OpenAI's input number includes the cached tokens.
INPUT_TOKENS, OUTPUT_TOKENS, CACHE_READ_TOKENS, CACHE_WRITE_TOKENS = 100, 10, 20, 5
ANTHROPIC_USAGE: Json = {
    "input_tokens": INPUT_TOKENS,
    "cache_read_input_tokens": CACHE_READ_TOKENS,
    "cache_creation_input_tokens": CACHE_WRITE_TOKENS,
    "output_tokens": OUTPUT_TOKENS,
}
RESPONSES_USAGE: Json = {
    "input_tokens": INPUT_TOKENS + CACHE_READ_TOKENS,
    "input_tokens_details": {"cached_tokens": CACHE_READ_TOKENS},
    "output_tokens": OUTPUT_TOKENS,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": INPUT_TOKENS + CACHE_READ_TOKENS + OUTPUT_TOKENS,
}
CHAT_USAGE: Json = {
    "prompt_tokens": INPUT_TOKENS + CACHE_READ_TOKENS,
    "prompt_tokens_details": {"cached_tokens": CACHE_READ_TOKENS},
    "completion_tokens": OUTPUT_TOKENS,
    "total_tokens": INPUT_TOKENS + CACHE_READ_TOKENS + OUTPUT_TOKENS,
}
_ids = itertools.count(1)


@dataclass
class Call:
    name: str
    arguments: str
    """JSON, or for a custom (freeform) tool the bare input."""
    custom: bool = False
    namespace: str | None = None
    id: str = field(default_factory=lambda: f"call_{next(_ids):08d}")


Step = str | float | Call  # say, stream dots for seconds, call a tool
Turn = tuple[str, str]  # ("user" | "assistant" | "result", text)


async def _words(steps: list[Step]) -> AsyncIterator[str | Call]:
    for step in steps:
        if isinstance(step, Call):
            yield step
        elif isinstance(step, str):
            for word in re.findall(r"\s*\S+\s*", step) or [step]:
                yield word
        else:
            for _ in range(max(1, int(step * 10))):
                yield "."
                await asyncio.sleep(0.1)


def _blocks(content: Any) -> list[Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])


# --- Anthropic Messages ---


def anthropic_turns(body: Json) -> list[Turn]:
    turns: list[Turn] = []
    for message in body.get("messages", []):
        for block in _blocks(message["content"]):
            if block["type"] == "tool_result":
                turns.append(("result", ""))
            elif block["type"] == "text":
                turns.append((message["role"], block["text"]))
            elif block["type"] == "tool_use":
                turns.append(("call", ""))
    return turns


async def anthropic_events(model: str, steps: list[Step]) -> AsyncIterator[Json]:
    message = _anthropic_message(model, [], None, {**ANTHROPIC_USAGE, "output_tokens": 1})
    yield {"type": "message_start", "message": message}
    index, in_text = -1, False
    async for part in _words(steps):
        if isinstance(part, Call) or not in_text:
            if in_text:
                yield {"type": "content_block_stop", "index": index}
            index, in_text = index + 1, not isinstance(part, Call)
            block: Json = {"type": "text", "text": ""}
            if isinstance(part, Call):
                block = {"type": "tool_use", "id": f"toolu_{part.id}", "name": part.name, "input": {}}
            yield {"type": "content_block_start", "index": index, "content_block": block}
        if isinstance(part, Call):
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
            yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}
        else:
            delta = {"type": "text_delta", "text": part}
            yield {"type": "content_block_delta", "index": index, "delta": delta}
    if in_text:
        yield {"type": "content_block_stop", "index": index}
    end = {"stop_reason": _stop_reason(steps), "stop_sequence": None}
    yield {"type": "message_delta", "delta": end, "usage": ANTHROPIC_USAGE}
    yield {"type": "message_stop"}


async def anthropic_body(model: str, steps: list[Step]) -> Json:
    content: list[Json] = []
    text = ""
    async for part in _words(steps):
        if isinstance(part, Call):
            called = {"type": "tool_use", "id": f"toolu_{part.id}", "name": part.name}
            content.append({**called, "input": json.loads(part.arguments)})
        else:
            text += part
    content[:0] = [{"type": "text", "text": text}] if text else []
    return _anthropic_message(model, content, _stop_reason(steps), ANTHROPIC_USAGE)


def _anthropic_message(model: str, content: list[Json], stop_reason: str | None, usage: Json) -> Json:
    return {
        "id": f"msg_{next(_ids):08d}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _stop_reason(steps: list[Step]) -> str:
    return "tool_use" if any(isinstance(step, Call) for step in steps) else "end_turn"


# --- OpenAI Responses ---


def responses_turns(body: Json) -> list[Turn]:
    turns: list[Turn] = []
    items = body.get("input", [])
    for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
        kind = item.get("type", "message")
        if kind == "message":
            turns += [(item["role"], block.get("text") or "") for block in _blocks(item["content"])]
        elif kind.endswith("_call_output"):
            turns.append(("result", ""))
        elif kind.endswith("_call"):
            turns.append(("call", ""))
    return turns


def responses_tools(body: Json) -> list[Json]:
    items = body.get("input", [])
    extra = [] if isinstance(items, str) else [i for i in items if i.get("type") == "additional_tools"]
    return [*(body.get("tools") or []), *(tool for item in extra for tool in item.get("tools", []))]


async def responses_events(model: str, steps: list[Step]) -> AsyncIterator[Json]:
    response: Json = {"id": f"resp_{next(_ids):08d}", "object": "response", "created_at": 0, "model": model}
    yield {"type": "response.created", "response": {**response, "status": "in_progress", "output": []}}
    output: list[Json] = []
    item: Json | None = None
    text = ""
    async for part in _words(steps):
        if isinstance(part, Call):
            if item is not None:
                for event in _message_done(item, text, len(output), output):
                    yield event
                item = None
            called = _call_item(part)
            yield {"type": "response.output_item.added", "output_index": len(output), "item": called}
            yield {"type": "response.output_item.done", "output_index": len(output), "item": called}
            output.append(called)
            continue
        if item is None:
            item, text = _message_item(), ""
            place = {"item_id": item["id"], "output_index": len(output), "content_index": 0}
            yield {"type": "response.output_item.added", "output_index": len(output), "item": item}
            empty = {"type": "output_text", "text": "", "annotations": []}
            yield {"type": "response.content_part.added", **place, "part": empty}
        text += part
        yield {"type": "response.output_text.delta", **place, "delta": part}
    if item is not None:
        for event in _message_done(item, text, len(output), output):
            yield event
    done = {**response, "status": "completed", "output": output, "usage": RESPONSES_USAGE}
    yield {"type": "response.completed", "response": done}


def _message_item() -> Json:
    identity = f"msg_{next(_ids):08d}"
    return {"type": "message", "id": identity, "role": "assistant", "status": "in_progress", "content": []}


def _message_done(item: Json, text: str, index: int, output: list[Json]) -> Iterator[Json]:
    part = {"type": "output_text", "text": text, "annotations": []}
    place = {"item_id": item["id"], "output_index": index, "content_index": 0}
    yield {"type": "response.output_text.done", **place, "text": text}
    yield {"type": "response.content_part.done", **place, "part": part}
    output.append({**item, "status": "completed", "content": [part]})
    yield {"type": "response.output_item.done", "output_index": index, "item": output[-1]}


def _call_item(call: Call) -> Json:
    item: Json = {"id": f"fc_{call.id}", "call_id": call.id, "name": call.name, "status": "completed"}
    if call.custom:
        return {"type": "custom_tool_call", **item, "input": call.arguments}
    namespace = {"namespace": call.namespace} if call.namespace else {}
    return {"type": "function_call", **item, **namespace, "arguments": call.arguments}


async def responses_body(model: str, steps: list[Step]) -> Json:
    last: Json = {}
    async for event in responses_events(model, steps):
        last = event
    response: Json = last["response"]
    return response


# --- OpenAI Chat Completions ---


def chat_turns(body: Json) -> list[Turn]:
    turns: list[Turn] = []
    for message in body.get("messages", []):
        role = "result" if message["role"] == "tool" else message["role"]
        texts = [block.get("text") or "" for block in _blocks(message.get("content"))] or [""]
        turns += [("call" if message.get("tool_calls") else role, text) for text in texts]
    return turns


async def chat_events(model: str, steps: list[Step]) -> AsyncIterator[Json]:
    base = {"id": f"chatcmpl-{next(_ids)}", "object": "chat.completion.chunk", "created": 0, "model": model}
    async for part in _words(steps):
        delta: Json = {"role": "assistant", "content": part}
        if isinstance(part, Call):
            delta = {"role": "assistant", "tool_calls": [{"index": 0, **_chat_call(part)}]}
        yield {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": _finish_reason(steps)}]}
    yield {**base, "choices": [], "usage": CHAT_USAGE}


async def chat_body(model: str, steps: list[Step]) -> Json:
    message: Json = {"role": "assistant", "content": ""}
    async for part in _words(steps):
        if isinstance(part, Call):
            message["tool_calls"] = [_chat_call(part)]
        else:
            message["content"] += part
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(steps)}
    base = {"id": f"chatcmpl-{next(_ids)}", "object": "chat.completion", "created": 0, "model": model}
    return {**base, "choices": [choice], "usage": CHAT_USAGE}


def _chat_call(call: Call) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finish_reason(steps: list[Step]) -> str:
    return "tool_calls" if _stop_reason(steps) == "tool_use" else "stop"
