"""Calls through the gateway are counted as the model server reports them, for every API, streamed or not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from taskyard.gateway.budget import Budget
from taskyard.gateway.prices import Prices
from tests.support.door import KEY, Exchange, eventually, open_door, open_upstream
from tests.support.model_endpoint import (
    ASIDE,
    CACHE_READ_TOKENS,
    CACHE_WRITE_TOKENS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    model_endpoint,
)

USER = {"role": "user", "content": "[[text:hello there]]"}
REQUESTS: dict[str, dict[str, Any]] = {
    "/anthropic/v1/messages?beta=true": {"max_tokens": 10, "messages": [USER]},
    "/openai/v1/responses": {"input": [{"type": "message", **USER}]},
    "/openai/v1/chat/completions": {"messages": [USER], "stream_options": {"include_usage": True}},
}


@pytest.mark.parametrize("target", REQUESTS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_counts(target: str, stream: bool) -> None:
    body = {**REQUESTS[target], "model": "model-a", "stream": stream}
    if not stream:
        body.pop("stream_options", None)
    async with model_endpoint() as endpoint, open_door(endpoint.url) as door:
        answers = [await door.post(target, json.dumps(body).encode()) for _ in range(3)]
    for answer in answers:
        assert answer.status_code == 200
        assert "hello" in answer.text
    usage = door.gateway.usage
    written = CACHE_WRITE_TOKENS if "anthropic" in target else 0
    assert (usage.calls, usage.input_tokens, usage.output_tokens) == (3, 3 * INPUT_TOKENS, 3 * OUTPUT_TOKENS)
    assert (usage.cached_read_tokens, usage.cached_write_tokens) == (3 * CACHE_READ_TOKENS, 3 * written)
    assert list(usage.models) == ["model-a"]
    assert usage.models["model-a"].input_tokens == 3 * INPUT_TOKENS
    for call in door.calls:
        assert (call.status, call.complete, call.metered) == (200, True, True)
        assert target.partition("?")[0].endswith(call.endpoint)
        assert 0 < call.seconds < 60
    for request in endpoint.requests:
        keys = (request.headers.get("x-api-key"), request.headers.get("authorization"))
        assert keys == ((KEY, None) if "anthropic" in target else (None, f"Bearer {KEY}"))


async def test_what_costs_nothing_is_not_a_call() -> None:
    async with model_endpoint() as endpoint, open_door(endpoint.url) as door:
        assert (await door.post("/anthropic/v1/messages/count_tokens", b"{}")).json() == {
            "input_tokens": INPUT_TOKENS
        }
        async with httpx.AsyncClient(base_url=door.url) as client:
            assert (await client.head("/anthropic/api/hello")).status_code == 200
            assert (await client.get("/openai/v1/models")).json()["data"]
    assert len(endpoint.requests) == 3
    assert not door.calls
    assert door.gateway.usage.calls == 0


async def test_an_advisor_is_paid_from_the_same_budget() -> None:
    steps = [
        {"type": "message", "input_tokens": 1, "output_tokens": 2},
        {"type": "advisor_message", "model": "big", "input_tokens": 40, "output_tokens": 60},
    ]
    usage = {"input_tokens": 1, "output_tokens": 2, "iterations": steps}
    answer = json.dumps({"type": "message", "model": "small", "usage": usage}).encode()

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(answer, headers="Content-Type: application/json\r\n")

    prices = Prices({}).extended(
        {name: {"input": cost, "output": cost} for name, cost in (("small", 1), ("big", 1000))}
    )
    tool = {"type": "advisor_20260301", "name": "advisor", "model": "big"}
    body = json.dumps({"model": "small", "tools": [tool]}).encode()
    budget = Budget(cost=0.15)
    async with open_upstream(handler) as (url, _), open_door(url, budget=budget, prices=prices) as door:
        codes = [(await door.post("/anthropic/v1/messages", body)).status_code for _ in range(3)]
    assert codes == [200, 200, 403], "each costs 0.1 and a little"
    one = [("small", 1, 2, 3e-6), ("big", 40, 60, 0.1)]
    found = [(call.model, call.input_tokens, call.output_tokens, call.cost) for call in door.calls]
    assert found == one * 2
    assert door.gateway.usage.models["big"].output_tokens == 120


async def test_an_error_of_the_api_is_a_call_without_tokens() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "[[error:429|slow down]]"}]}
    async with model_endpoint() as endpoint, open_door(endpoint.url) as door:
        answer = await door.post("/anthropic/v1/messages", json.dumps(body).encode())
    assert answer.status_code == 429
    assert answer.json()["error"] == {"type": "rate_limit_error", "message": "slow down"}
    [call] = door.calls
    assert (call.status, call.metered, call.input_tokens) == (429, False, 0)


async def test_a_call_that_is_broken_off_counts_what_it_told() -> None:
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "[[slow:60]]"}]}
    async with model_endpoint() as endpoint, open_door(endpoint.url) as door, asyncio.timeout(60):
        async with httpx.AsyncClient(base_url=door.url) as client:
            request = client.stream("POST", "/anthropic/v1/messages", json=body)
            async with request as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("event: content_block_delta"):
                        break
        await eventually(lambda: bool(door.calls), "the call was not reported")
    [call] = door.calls
    assert (call.complete, call.metered, call.input_tokens) == (False, True, INPUT_TOKENS)
    assert 1 <= call.output_tokens < 20, "one for each piece that passed"
    assert not endpoint.requests[0].answered


async def test_the_script() -> None:
    """The model endpoint itself: which answer is due follows from the request alone."""
    tools = [{"name": "Write", "input_schema": {"properties": {"file_path": {}, "content": {}}}}]
    prompt = {"role": "user", "content": "Do: [[text:now]] [[write:a.txt|one|two]] [[text:written]]"}
    call = {"type": "tool_use", "id": "1", "name": "Write", "input": {}}
    called = {"role": "assistant", "content": [{"type": "text", "text": "now"}, call]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "ok"}]}
    final = {"role": "assistant", "content": "written"}

    async def ask(*messages: Any, offered: Any = tools) -> list[dict[str, Any]]:
        body = {"model": "m", "messages": messages, "tools": offered}
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{endpoint.url}/v1/messages", json=body)
        content: list[dict[str, Any]] = answer.json()["content"]
        return content

    async with model_endpoint() as endpoint:
        text, use = await ask(prompt)
        assert (text["text"], use["name"]) == ("now", "Write")
        assert use["input"] == {"file_path": "a.txt", "content": "one|two"}
        assert (await ask(prompt, called, result))[0]["text"] == "written"
        assert (await ask(prompt, called, result, final, {"role": "user", "content": "thanks"}))[0][
            "text"
        ] == ASIDE
        assert (await ask(prompt, called, result, final, prompt))[1]["name"] == "Write"
        assert (await ask(prompt, offered=[]))[0]["text"] == ASIDE
        assert "no tool" in (await ask({"role": "user", "content": "[[bash:ls]]"}))[0]["text"]
