"""Which models may be called, whichever way a request names them, and with which key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskyard.drive.traffic import routes
from taskyard.gateway.budget import Budget
from taskyard.gateway.models import ModelRoute
from taskyard.gateway.prices import Prices
from taskyard.gateway.request_body import CONTENT, FALLBACKS, fields_of, models_of
from taskyard.settings import ModelSettings, Settings, Upstream
from tests.support.door import KEY, Door, Exchange, eventually, open_door, open_upstream

MESSAGES = "/anthropic/v1/messages"


@asynccontextmanager
async def answering() -> AsyncIterator[tuple[str, list[Exchange]]]:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"{}", headers="Content-Type: application/json\r\n")

    async with open_upstream(handler) as found:
        yield found


async def message(door: Door, body: bytes, target: str = MESSAGES) -> tuple[int, str]:
    answer = await door.post(target, body)
    return answer.status_code, answer.json().get("error", {}).get("message", "")


@pytest.mark.parametrize(
    ("model", "allowed", "passes"),
    [
        ("claude-a", [["claude-*"]], True),
        ("claude-a", [["gpt-*", "claude-a"]], True),
        ("claude-a", [["claude-*"], ["claude-a"]], True),
        ("claude-a", [["claude-*"], ["claude-b"]], False),
        ("claude-a", [["claude"]], False),
        ("Claude-a", [["claude-*"]], False),
        ("gpt", [[]], False),
        ("gpt\nclaude-a", [["claude-*"]], False),
        ("", [["claude-*"]], False),
    ],
)
@pytest.mark.parametrize("target", [MESSAGES, "/openai/v1/responses", "/openai/v1/chat/completions"])
async def test_allowed_models(model: str, allowed: list[list[str]], passes: bool, target: str) -> None:
    body = json.dumps({"stream": False, "model": model}).encode()
    async with answering() as (url, seen), open_door(url, allowed_models=allowed) as door:
        status, said = await message(door, body, target)
    if passes:
        assert (status, json.loads(seen[0].body)) == (200, json.loads(body))
        return
    assert (status, seen) == (403, [])
    assert f"may not use the model '{model}'. Allowed: {', '.join(allowed[-1]) or 'none'}" in said
    assert [told.status for told in door.refusals] == [403]


async def test_what_is_no_call_names_no_model() -> None:
    async with answering() as (url, seen), open_door(url, allowed_models=[["claude-*"]]) as door:
        assert (await door.post("/anthropic/v1/messages/count_tokens", b"{}")).status_code == 200
        async with httpx.AsyncClient(base_url=door.url) as client:
            assert (await client.get("/openai/v1/models")).status_code == 200
    assert len(seen) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"model"',
        b"{}",
        b'{"model":null}',
        b'{"model":1}',
        b'{"model":["claude-a"]}',
        b'{"model":"claude-a"',
        b'{"model":"claude-a"}{"model":"evil"}',
        b'{"model":"claude-a"} x',
        b'{"model":"claude-a","Model":"evil"}',
        b'{"MODEL":"claude-a"}',
        '{"model":"claude-a","mo\u0064el\u017f":1,"MODEL":"evil"}'.encode(),
        b'{"model":"claude-a\xff"}',
        b'\xef\xbb\xbf{"model":"claude-a"}',
        '{"model":"claude-a"}'.encode("utf-16"),
        b'{"x":' + b"[" * 100_000 + b'],"model":"claude-a"}',
        json.dumps({"model": "claude-" + "a" * 300}).encode(),
    ],
    ids=range(18),
)
async def test_bodies_whose_model_is_not_clear(body: bytes) -> None:
    async with answering() as (url, seen), open_door(url, allowed_models=[["claude-*"]]) as door:
        status, said = await message(door, body)
    assert (status, seen) == (400, [])
    assert "the body of a model call" in said or "name of the model" in said


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"evil","model":"claude-a"}',
        b'{"model":"evil","max_tokens":1,"mod\\u0065l":"claude-a"}',
        b' { "mod\\u0065l" : "claude-\\u0061" } ',
    ],
)
async def test_a_field_that_stands_there_twice_goes_on_once(body: bytes) -> None:
    async with answering() as (url, seen), open_door(url, allowed_models=[["claude-*"]]) as door:
        assert (await message(door, body))[0] == 200
        assert (await message(door, b'{"model":"claude-a","model":"evil"}'))[0] == 403
    [sent] = seen
    pairs = json.loads(sent.body, object_pairs_hook=list)
    assert [value for name, value in pairs if name == "model"] == ["claude-a"]
    assert b"evil" not in sent.body
    assert sent.headers["content-length"] == [str(len(sent.body))]


async def test_nothing_else_says_the_model() -> None:
    """Upstreams that take it from the query, or a body for a form, would use another one than the one that was read."""
    body = b'{"model":"claude-a","x":"&model=evil&a="}'
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Content-Encoding": "br"}
    async with (
        answering() as (url, seen),
        open_door(url, allowed_models=[["claude-*"]]) as door,
        httpx.AsyncClient(base_url=door.url, headers=headers) as client,
    ):
        for query in (
            "model=evil",
            "beta=true&model=evil",
            "%6dodel=evil",
            "beta=true;model=evil",
            "Model",
        ):
            answer = await client.post(f"{MESSAGES}?{query}", content=body)
            assert answer.status_code == 400
            assert "holds beta and api-version only" in answer.json()["error"]["message"]
        assert not seen
        assert (await client.post(f"{MESSAGES}?beta=true&api-version=1", content=body)).status_code == 200
    [sent] = seen
    assert sent.target == "/v1/messages?beta=true&api-version=1"
    assert sent.headers["content-type"] == ["application/json"]
    assert "content-encoding" not in sent.headers


async def test_a_body_of_too_many_fields() -> None:
    body = b'{"model":"claude-a",' + b",".join(b'"%d":1' % number for number in range(2000)) + b"}"
    async with answering() as (url, seen), open_door(url, allowed_models=[["claude-*"]]) as door:
        status, said = await message(door, body)
    assert (status, seen, door.calls) == (400, [], [])
    assert "has more than 1000 fields" in said


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        (b'"x":["model"' + b",[]" * 400_000 + b"]", "more than 1048576 bytes in fields that may name"),
        (b'"tools":[' + b'{"type":"x","a":["model"' + b",[]" * 400_000 + b"]}]", "more than 1048576 bytes"),
        (
            b'"tools":[{"model":"claude-b"' + b"".join(b',"%d":1' % n for n in range(50)) + b"}]",
            "more than 50",
        ),
    ],
    ids=["field", "tool", "fields of a tool"],
)
async def test_a_search_for_models_has_a_limit(rest: bytes, why: str) -> None:
    """It is done between the requests of other runs; 32 MB of small values would take seconds and a gigabyte."""
    async with answering() as (url, seen), open_door(url, allowed_models=[["claude-*"]]) as door:
        status, said = await message(door, b'{"model":"claude-a",' + rest + b"}")
    assert (status, seen) == (400, [])
    assert why in said


MAIN = '"model":"claude-a"'


@pytest.mark.parametrize(
    ("rest", "passes"),
    [
        ('"tools":[{"type":"advisor_20260301","name":"advisor","model":"%s"}]', True),
        ('"tools":[{"type":"advisor_20260301","mod\\u0065l":"%s"}]', True),
        ('"Tools":[{"Model":"%s"}]', True),
        ('"tools":[{"type":"x:advisor","parameters":{"model":"%s"}}]', True),
        ('"tools":[{"Type":"x:advisor","parameters":{"model":"%s"}}]', True),
        ('"tools":[{"type":"function","Type":"x","parameters":{"model":"%s"}}]', True),
        ('"advisor":{"model":"%s"}', True),
        ('"plugins":[{"id":"x","deep":[[{"Model":"%s"}]]}]', True),
        ('"tools":[{"type":"x","a":{"model":"%s","model":"claude-a"}}]', True),
        # However good the names are.
        ('"tools":[{"type":"x","model":"%s","model":"claude-a"}]', False),
        ('"tools":[{"type":"x","type":"function","parameters":{"model":"%s"}}]', False),
        ('"models":["%s"]', False),
        ('"Fallbacks":[{"model":"%s"}]', False),
        ('"context_window_fallbacks":[{"claude-a":["%s"]}]', False),
        ('"advisor":{"model":"%s"},"tools":[{"model":7}]', False),
        ('"tools":{"model":"%s"}', False),
    ],
)
@pytest.mark.parametrize("target", [MESSAGES, "/openai/v1/chat/completions"])
async def test_further_models(rest: str, passes: bool, target: str) -> None:
    """Of tools that run at the vendor, and of routers: they are checked, or refused where they cannot be."""
    async with answering() as (url, seen), open_door(url, allowed_models=[["claude-*"]]) as door:
        good, bad = (f"{{{MAIN},{rest % name}}}".encode() for name in ("claude-b", "opus"))
        assert (await message(door, good, target))[0] == (200 if passes else 400)
        status, said = await message(door, bad, target)
    assert (status, len(seen)) == (403 if passes else 400, int(passes))
    if passes:
        assert "may not use the model 'opus'" in said


@pytest.mark.parametrize(
    "rest",
    [
        '"tools":[{"name":"Task","input_schema":{"properties":{"model":{"enum":["opus"]}},"examples":[{"model":"opus"}]}}]',
        '"tools":[{"type":"function","parameters":{"x":{"model":"opus"}}},{"type":"custom","a":{"model":"opus"}}]',
        '"messages":[{"role":"user","content":[{"type":"tool_use","input":{"model":"opus"}}]}]',
        '"response_format":{"json_schema":{"examples":[{"model":"opus"}]}}',
        '"models":null,"fallbacks":[]',
        '"tools":null,"metadata":{"model":"opus"},"note":"the \\"model\\" opus"',
    ],
)
async def test_arguments_and_texts_name_no_model(rest: str) -> None:
    async with answering() as (url, seen), open_door(url, allowed_models=[["claude-*"]]) as door:
        body = f"{{{MAIN},{rest}}}".encode()
        assert (await message(door, body))[0] == 200
    assert json.loads(seen[0].body) == json.loads(body)


async def test_a_further_model_needs_a_price() -> None:
    prices = Prices({}).extended({"claude": {"input": 1, "output": 1}})
    async with answering() as (url, seen), open_door(url, budget=Budget(cost=1.0), prices=prices) as door:
        tool = {"type": "advisor_20260301", "name": "advisor", "model": "mystery"}
        status, said = await message(door, json.dumps({"model": "claude-a", "tools": [tool]}).encode())
    assert (status, seen) == (403, [])
    assert "nobody has said what the model 'mystery' costs" in said


OTHERS = {"model", *FALLBACKS, *CONTENT}
SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(st.dictionaries(st.text().filter(lambda name: name.casefold() not in OTHERS), JSON), st.text())
def test_the_rest_of_the_body_stays(fields: dict[str, object], model: str) -> None:
    body = {**fields, "model": model}
    read = fields_of(json.dumps(body).encode())
    assert models_of(read)[0] == model
    assert json.loads(msgspec.json.encode(read)) == body


NAMES = (
    st.sampled_from(["model", "Model", "tools", "type", "parameters", "models", "function", "x"]) | st.text()
)
NESTED = st.recursive(
    SCALARS | st.just("opus"), lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=30
)


@given(st.dictionaries(NAMES, NESTED).map(lambda fields: {**fields, "model": "claude-a"}))
def test_any_body_is_read_or_refused(body: dict[str, object]) -> None:
    read = fields_of(json.dumps(body).encode())
    try:
        found = models_of(read)
    except ValueError:
        return  # refused
    assert found[0] == "claude-a"
    rest = {name: value for name, value in body.items() if name.casefold() not in OTHERS}
    assert ("opus" in found[1:]) >= ('"model": "opus"' in json.dumps(rest))


async def test_dollars_need_a_price() -> None:
    prices = Prices({}).extended({"claude": {"input": 1, "output": 1}})
    async with answering() as (url, seen), open_door(url, budget=Budget(cost=1.0), prices=prices) as door:
        assert (await message(door, b'{"model":"claude-a"}'))[0] == 200
        status, said = await message(door, b'{"model":"mystery"}')
    assert (status, len(seen)) == (403, 1)
    assert "nobody has said what the model 'mystery' costs" in said
    assert "models.prices" in said


async def test_a_body_that_is_read_ahead_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskyard.gateway.calls.MAX_READ_AHEAD", 1000)
    async with answering() as (url, seen), open_door(url, allowed_models=[["*"]]) as door:
        status, said = await message(door, b'{"model":"a"}'.ljust(1001))
    assert (status, seen) == (413, [])
    assert "exceeds 1000 bytes" in said


async def test_requests_held_at_once_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskyard.gateway.calls.MAX_HELD", 2500)
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await go_on.wait()
        await exchange.answer(b"{}", headers="Content-Type: application/json\r\n")

    body = b'{"model":"a"}'.ljust(1000)
    async with open_upstream(handler) as (url, seen), open_door(url, allowed_models=[["*"]]) as door:
        held = [asyncio.create_task(message(door, body)) for _ in range(2)]
        await eventually(lambda: len(seen) == 2, "two calls at the upstream")
        status, said = await message(door, body)
        assert (status, len(seen)) == (429, 2)
        assert "Try again later" in said
        go_on.set()
        assert [(await one)[0] for one in held] == [200, 200]
        assert (await message(door, body))[0] == 200, "there is room again"


# --- keys ---


async def test_a_key_in_a_file_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As programs do that fetch short-lived tokens for a cloud: the file is replaced while a run goes on."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("key-number-one\n")
    async with answering() as (url, seen):
        upstream = Upstream(base_url=url, api_key_file=file, auth="bearer")
        settings = Settings(_env_file=None, data_dir=tmp_path, models=ModelSettings(anthropic=upstream))
        async with open_door(routes=routes(settings)) as door:
            assert (await message(door, b"{}"))[0] == 200
            file.write_text("key-number-two")
            assert (await message(door, b"{}"))[0] == 200
            file.write_text("key with spaces")
            assert (await message(door, b"{}"))[0] == 502
            file.unlink()
            status, said = await message(door, b"{}")
            assert status == 502
            assert (
                said
                == "Taskyard: the API key for anthropic cannot be read on this server; check its settings."
            )
            file.write_text("key-number-three")
            assert (await message(door, b"{}"))[0] == 200
    sent = [one.headers["authorization"] for one in seen]
    assert sent == [[f"Bearer key-number-{word}"] for word in ("one", "two", "three")]
    assert "key with spaces" not in str(door.refusals)


@pytest.mark.parametrize(
    ("auth", "header", "value"),
    [
        (None, "x-api-key", KEY),
        ("bearer", "authorization", f"Bearer {KEY}"),
        ("api-key", "api-key", KEY),
        ("none", None, None),
    ],
)
async def test_ways_to_take_a_key(auth: Any, header: str | None, value: str | None) -> None:
    async with answering() as (url, seen):
        route = ModelRoute(url, KEY if header else None, auth=auth)
        async with (
            open_door(routes={"anthropic": route}) as door,
            httpx.AsyncClient(base_url=door.url) as client,
        ):
            inside = {"x-api-key": "inside", "authorization": "Bearer inside", "api-key": "inside"}
            assert (await client.post(MESSAGES, content=b"{}", headers=inside)).status_code == 200
    names = {"x-api-key", "authorization", "api-key"}
    assert {name: seen[0].headers.get(name) for name in names & seen[0].headers.keys()} == (
        {header: [value]} if header else {}
    )


async def test_paths_and_headers_of_a_cloud() -> None:
    async with answering() as (url, seen):
        route = ModelRoute(
            f"{url}/openai/deployments/mine", KEY, "api-key", "", {"anthropic-version": "own", "X-Team": "7"},
            "api-version=2025-04-01",
        )  # fmt: skip
        async with (
            open_door(routes={"openai": route}) as door,
            httpx.AsyncClient(base_url=door.url) as client,
        ):
            target = "/openai/v1/chat/completions?x=1"
            answer = await client.post(target, content=b"{}", headers={"x-team": "from inside"})
    assert answer.status_code == 200
    assert seen[0].target == "/openai/deployments/mine/chat/completions?x=1&api-version=2025-04-01"
    assert (seen[0].headers["x-team"], seen[0].headers["anthropic-version"]) == (["7"], ["own"])


async def test_no_secret_comes_back_in_an_error() -> None:
    secret = "Basic c2VjcmV0LW9mLXRoZS1wcm94eQ=="

    async def handler(exchange: Exchange) -> None:
        body = f"I got {KEY} and {secret}, team 7".encode()
        await exchange.answer(body, 401, f"X-Echo: {KEY} {secret}\r\n")

    async with open_upstream(handler) as (url, _):
        route = ModelRoute(url, KEY, headers={"Proxy-Auth": secret, "X-Team": "7"})
        async with open_door(routes={"anthropic": route}) as door:
            answer = await door.post(MESSAGES, b"{}")
    assert answer.status_code == 401
    assert answer.text == f"I got {'*' * len(KEY)} and {'*' * len(secret)}, team 7"
    assert answer.headers["x-echo"] == f"{'*' * len(KEY)} {'*' * len(secret)}"
    assert secret not in repr(route)
