"""The end of a budget: before a call, and in the middle of an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from taskyard.gateway.budget import Budget
from taskyard.gateway.prices import Prices, Tokens
from tests.support.door import Door, Exchange, eventually, open_door, open_upstream

Json = dict[str, Any]
MESSAGES, RESPONSES, CHAT = "/anthropic/v1/messages", "/openai/v1/responses", "/openai/v1/chat/completions"
PRICES = Prices({}).extended({"m": {"input": 1_000, "output": 100_000}})
SSE = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

STARTS: dict[str, Json] = {
    MESSAGES: {
        "type": "message_start",
        "message": {"model": "m", "usage": {"input_tokens": 5, "output_tokens": 1}},
    },
    RESPONSES: {
        "type": "response.created",
        "response": {"model": "m", "status": "in_progress", "usage": None},
    },
    CHAT: {"model": "m", "choices": [{"delta": {"role": "assistant"}}], "usage": None},
}
DELTAS: dict[str, Json] = {
    MESSAGES: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word "}},
    RESPONSES: {"type": "response.output_text.delta", "delta": "word "},
    CHAT: {"model": "m", "choices": [{"delta": {"content": "word "}}], "usage": None},
}
apis = pytest.mark.parametrize("target", STARTS)


def event(data: Json, line_end: str = "\n") -> bytes:
    return f"event: x{line_end}data: {json.dumps(data)}{line_end}{line_end}".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def whole(data: bytes) -> list[bytes]:
    return [data]


def endless(
    target: str, cut: Callable[[bytes], list[bytes]] = whole
) -> Callable[[Exchange], Awaitable[None]]:
    """A model that never stops talking, in chunks as `cut` makes them of each event."""

    async def handler(exchange: Exchange) -> None:
        await exchange.send(SSE.encode())
        for piece in cut(event(STARTS[target])):
            await exchange.send(chunk(piece))
        while True:
            for piece in cut(event(DELTAS[target])):
                await exchange.send(chunk(piece))
            await asyncio.sleep(0)

    return handler


async def ask(door: Door, target: str, model: str = "m") -> httpx.Response:
    async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
        return await client.post(target, json={"model": model, "stream": True})


def events(text: str) -> list[Json]:
    return [
        json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")
    ]


def told_by(target: str, last: Json) -> tuple[str, str]:
    """Kind and message of an error, as the API's clients read it."""
    if target == MESSAGES:
        assert last["type"] == "error"
        return last["error"]["type"], last["error"]["message"]
    if target == RESPONSES:
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        return last["response"]["error"]["code"], last["response"]["error"]["message"]
    return last["error"]["code"], last["error"]["message"]


KINDS = {MESSAGES: "permission_error", RESPONSES: "budget_exceeded", CHAT: "budget_exceeded"}
CUTS: dict[str, Callable[[bytes], list[bytes]]] = {
    "events": whole,
    "lines": lambda data: [line + b"\n" for line in data.split(b"\n")[:-1]],
    "bytes": lambda data: [data[at : at + 1] for at in range(len(data))],
    "shifted": lambda data: [data[:-1], data[-1:]],
    "halves": lambda data: [data[: len(data) // 2], data[len(data) // 2 :]],
}


@apis
@pytest.mark.parametrize("cut", CUTS)
async def test_an_answer_is_cut_in_the_middle(target: str, cut: str) -> None:
    spent: list[str] = []
    async with (
        open_upstream(endless(target, CUTS[cut])) as (url, seen),
        open_door(url, budget=Budget(tokens=50), on_budget=spent.append) as door,
    ):
        answer = await ask(door, target)
        assert answer.status_code == 200
        *before, last = events(answer.text)
        assert before[0] == STARTS[target]
        assert all(one == DELTAS[target] for one in before[1:])
        assert 40 <= len(before) <= 60, "each piece is a token, at the least"
        kind, message = told_by(target, last)
        assert kind == KINDS[target]
        assert message.startswith("Taskyard: this run's budget of 50 tokens is used up (5")
        await eventually(lambda: bool(door.calls), "the call was not reported")
        [call] = door.calls
        assert (call.status, call.complete) == (200, False)
        assert call.output_tokens >= 40
        assert len(spent) == 1
        assert door.gateway.over_budget is not None
        # The next one does not go out at all.
        refused = await ask(door, target)
        assert refused.status_code == 403
        assert "budget of 50 tokens is used up" in refused.json()["error"]["message"]
        assert refused.json()["error"].get("code", "budget_exceeded") == "budget_exceeded"
        assert (len(seen), len(spent)) == (1, 1)
    assert [told.status for told in door.refusals] == [403]


async def test_dollars() -> None:
    async with (
        open_upstream(endless(MESSAGES)) as (url, _),
        open_door(url, budget=Budget(cost=2.0), prices=PRICES) as door,
    ):
        *before, last = events((await ask(door, MESSAGES)).text)
    # 5 tokens for 0.005, then 0.1 for each piece.
    assert len(before) == 1 + 20
    assert "this run's budget of $2.00 is used up ($2.0" in last["error"]["message"]


async def test_calls_at_once_share_it() -> None:
    async with open_upstream(endless(CHAT)) as (url, _), open_door(url, budget=Budget(tokens=100)) as door:
        answers = await asyncio.gather(*(ask(door, CHAT) for _ in range(4)))
        sizes = [len(events(answer.text)) for answer in answers]
    assert sum(sizes) < 100 + 4 * 10, sizes


async def test_calls_that_used_the_same_are_two() -> None:
    """One that ends takes nothing of another one with it, though both have used nothing so far."""
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        if b"bad" in exchange.body:
            await exchange.answer(b"{}", 400, "Content-Type: application/json\r\n")
            return
        await go_on.wait()
        body = event(STARTS[MESSAGES]) + event(DELTAS[MESSAGES]) * 100
        await exchange.answer(body, headers="Content-Type: text/event-stream\r\n")

    async with open_upstream(handler) as (url, seen), open_door(url, budget=Budget(tokens=50)) as door:
        first = asyncio.create_task(ask(door, MESSAGES))
        await eventually(lambda: len(seen) == 1, "the call does not come")
        assert (await ask(door, MESSAGES, "bad")).status_code == 400
        go_on.set()
        assert events((await first).text)[-1]["type"] == "error", "it is cut"
        await eventually(lambda: len(door.calls) == 2, "the calls were not reported")
        assert (await ask(door, MESSAGES)).status_code == 403


async def test_it_is_looked_at_when_the_body_is_there() -> None:
    """Heads may come early, and many of them."""
    usage = {"input_tokens": 5, "output_tokens": 500}

    async def handler(exchange: Exchange) -> None:
        body = json.dumps({"model": "m", "usage": usage}).encode()
        await exchange.answer(body, headers="Content-Type: application/json\r\n")

    body = b'{"model":"m"}'
    head = f"POST {MESSAGES} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    async with open_upstream(handler) as (url, seen), open_door(url, budget=Budget(tokens=100)) as door:
        reader, writer = await door.connect()
        writer.write(head.encode() + body[:1])
        await eventually(lambda: len(door.gateway._policy.budget._open) == 1, "the head does not come")
        assert (await ask(door, MESSAGES)).status_code == 200
        writer.write(body[1:])
        async with asyncio.timeout(60):
            assert (await reader.read()).startswith(b"HTTP/1.1 403")
        writer.close()
        assert (len(seen), len(door.calls)) == (1, 1), "what did not go out is no call"


@pytest.mark.parametrize("budget", [Budget(tokens=100), Budget(cost=1.0)], ids=["tokens", "dollars"])
async def test_answers_that_come_later_cannot_be_counted(budget: Budget) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"{}", headers="Content-Type: application/json\r\n")

    async with open_upstream(handler) as (url, seen), open_door(url, budget=budget, prices=PRICES) as door:
        for body in (
            b'{"model":"m","background":true}',
            b'{"background":false,"model":"m","background" : 1}',
        ):
            answer = await door.post(RESPONSES, body)
            assert answer.status_code == 400
            assert "a response in the background cannot be counted" in answer.json()["error"]["message"]
        assert (await door.post(RESPONSES, b'{"model":"m","background":false}')).status_code == 200
    assert len(seen) == 1
    async with open_upstream(handler) as (url, seen), open_door(url) as door:
        assert (await door.post(RESPONSES, b'{"model":"m","background":true}')).status_code == 200


async def test_a_length_that_was_promised_does_not_hold() -> None:
    """An answer with a Content-Length that is cut."""
    body = event(STARTS[MESSAGES]) + event(DELTAS[MESSAGES]) * 100

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(body, headers="Content-Type: text/event-stream\r\n")

    async with open_upstream(handler) as (url, _), open_door(url, budget=Budget(tokens=10)) as door:
        answer = await ask(door, MESSAGES)
        assert "content-length" not in answer.headers
        assert events(answer.text)[-1]["type"] == "error"


async def test_an_answer_in_one_piece_is_not_cut() -> None:
    usage = {"input_tokens": 5, "output_tokens": 500}

    async def handler(exchange: Exchange) -> None:
        body = json.dumps({"model": "m", "usage": usage}).encode()
        await exchange.answer(body, headers="Content-Type: application/json\r\n")

    async with open_upstream(handler) as (url, _), open_door(url, budget=Budget(tokens=100)) as door:
        assert (await ask(door, MESSAGES)).json()["usage"] == usage
        assert (await ask(door, MESSAGES)).status_code == 403
        async with httpx.AsyncClient(base_url=door.url) as client:
            assert (await client.get("/anthropic/v1/models")).status_code == 200, "what costs nothing goes on"


async def test_an_agent_that_does_not_wait_for_answers_is_charged() -> None:
    asked = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        asked.set()
        await exchange.reader.read()

    async with open_upstream(handler) as (url, _), open_door(url, budget=Budget(tokens=1000)) as door:
        reader, writer = await door.connect()
        body = b'{"model":"m"}'.ljust(8000)
        writer.write(
            f"POST {MESSAGES} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        await asked.wait()
        writer.close()
        await eventually(lambda: bool(door.calls), "the call was not reported")
        [call] = door.calls
        assert (call.status, call.metered, call.input_tokens) == (499, False, 2000)
        assert (await ask(door, MESSAGES)).status_code == 403
        del reader


async def test_a_model_that_answers_by_another_name_costs_what_was_asked_for() -> None:
    async def handler(exchange: Exchange) -> None:
        body = json.dumps(
            {"model": "nobody-knows", "usage": {"input_tokens": 1000, "output_tokens": 0}}
        ).encode()
        await exchange.answer(body, headers="Content-Type: application/json\r\n")

    async with (
        open_upstream(handler) as (url, _),
        open_door(url, budget=Budget(cost=1.0), prices=PRICES) as door,
    ):
        assert (await ask(door, MESSAGES)).status_code == 200
        assert door.calls[0].cost == pytest.approx(1.0)
        assert (await ask(door, MESSAGES)).status_code == 403


async def test_what_earlier_workers_spent_counts() -> None:
    spent: list[str] = []
    budget = Budget(tokens=100, spent_tokens=100)
    async with open_door(budget=budget, on_budget=spent.append) as door:
        answer = await ask(door, MESSAGES)
        assert answer.status_code == 403
        assert "(100 were used)" in answer.json()["error"]["message"]
    assert not door.calls


def test_sums() -> None:
    budget = Budget(cost=1.0, tokens=1000, spent_cost=0.5, spent_tokens=100)
    tab = budget.open()
    said = []
    for tab.tokens, tab.cost in ((0, 0.0), (899, 0.4), (900, 0.4)):
        said.append(budget.exceeded)
    # What it used in the end counts, not what it seemed to use; what comes from a cache is not a budget's.
    budget.close(tab, Tokens(100, 100, 5000, 100).counted, 0.2)
    said.append(budget.exceeded)
    budget.close(budget.open(), 0, 0.3)
    said.append(budget.exceeded)
    assert said == [
        None,
        None,
        "this run's budget of 1,000 tokens is used up (1,000 were used).",
        None,
        "this run's budget of $1.00 is used up ($1.00 were spent).",
    ]


def test_a_month() -> None:
    # 0.4 of the 9.5 are this run's own.
    budget = Budget(project_month_cost=10.0, spent_month=9.5, spent_cost=0.4)
    assert (budget.limited, budget.in_dollars, budget.exceeded) == (True, True, None)
    budget.close(budget.open(), 0, 0.5)
    assert budget.exceeded is not None
    assert "the budget of $10.00 that this run's project has for a month" in budget.exceeded


def test_no_limit() -> None:
    budget = Budget(spent_cost=1e9, spent_tokens=10**12)
    assert (budget.limited, budget.exceeded) == (False, None)
