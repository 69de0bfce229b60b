"""Schemas and values that would take for ever, and everybody else meanwhile."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from taskyard import json_schema
from tests.support.yard import Yard, error, ok

EVIL = {"properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
BOMB = {"a": "a" * 60 + "!"}


def doubling(depth: int) -> dict[str, Any]:
    """References that lead to 2 ** depth looks at one value."""
    found: dict[str, Any] = {"$defs": {"s0": {"type": "integer"}}, "$ref": f"#/$defs/s{depth}"}
    for n in range(1, depth + 1):
        found["$defs"][f"s{n}"] = {"allOf": [{"$ref": f"#/$defs/s{n - 1}"}] * 2}
    return found


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (EVIL, BOMB),
        (doubling(40), 1),
        ({"uniqueItems": True}, [{"n": n} for n in range(5000)]),
    ],
)
async def test_bombs_are_given_up(monkeypatch: pytest.MonkeyPatch, schema: Any, value: Any) -> None:
    """The seconds of CPU are those of another process: this one does not even begin."""

    def here(*_: Any) -> str:
        raise AssertionError("the server itself must not check this")

    monkeypatch.setattr(json_schema, "value_problem_now", here)
    assert await json_schema.value_problem(schema, value) == json_schema.TOO_MUCH


@pytest.mark.parametrize(
    ("schema", "value", "problem"),
    [
        ({"type": "object", "required": ["n"]}, {"n": 1}, None),
        ({"type": "object", "required": ["n"]}, {}, "'n' is a required property"),
        ({"$schema": "https://example.org/mine", "type": "string"}, 1, "1 is not of type 'string'"),
        ({"pattern": "^a$"}, "a", None),
        ({"pattern": "^a$"}, "b", "'b' does not match '^a$'"),
        (doubling(3), "x", "'x' is not of type 'integer'"),
        (True, 1, None),
        ({"pattern": "("}, "x", "json_schema cannot be applied to it"),
        ({"$schema": 3}, "x", "json_schema cannot be applied to it"),
        ({"type": "what"}, "x", "json_schema cannot be applied to it"),
        ({"multipleOf": 0.5}, 10**400, "json_schema cannot be applied to it"),
        ({"$ref": "#"}, 1, json_schema.TOO_DEEP),
    ],
)
async def test_values(schema: Any, value: Any, problem: str | None) -> None:
    """Here and now, or in a process: the same answers."""
    assert await json_schema.value_problem(schema, value) == problem
    assert await json_schema._apart([schema, value]) == problem


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "good"),
    [
        ({"type": "object"}, True),
        ({"properties": {f"p{n}": {"type": "string"} for n in range(500)}}, True),
        ({"properties": {f"p{n}": {"type": "strin"} for n in range(500)}}, False),
        ({"type": "strin"}, False),
        ({"pattern": "("}, False),
        ({"$schema": 3}, False),
        ({"$schema": ["x"]}, False),
        (nested(400), False),
    ],
)
async def test_schemas(schema: Any, good: bool) -> None:
    assert (await json_schema.schema_problem(schema) is None) == good


async def test_a_number_that_cannot_be_kept() -> None:
    """It would come back as null, which no output fits."""
    assert await json_schema.schema_problem(json.loads('{"maximum": 1e999}')) == "a number in it is too large"


async def test_over_http(yard: Yard) -> None:
    """A bomb is refused, others are served meanwhile, and the run is not locked."""
    task = await yard.api().create_task(title="x", json_schema=EVIL)
    run = await yard.api().create_run(task)
    bomb = asyncio.create_task(run.api.patch(run.path("set_output/"), {"output": BOMB}))
    served = 0
    while not bomb.done() and served < 50:
        await run.patch(stage=f"s{served}")
        served += 1
    refused = await bomb
    assert refused.status_code == 400
    assert refused.json() == {"error": f"Output validation error: {json_schema.TOO_MUCH}"}
    assert served > 2
    assert (await run.fetch())["output"] is None
    assert ok(await run.api.patch(run.path("set_output/"), {"output": {"a": "aaa"}}))["output"] == {
        "a": "aaa"
    }


async def test_no_connection_is_held_meanwhile(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks take seconds at times, and there are few connections."""
    held = []

    async def looked_at(*_: Any) -> None:
        rows = await yard.database.fetch(
            "SELECT query FROM pg_stat_activity"
            " WHERE datname = current_database() AND state LIKE 'idle in transaction%%'"
        )
        held.append([row["query"] for row in rows])

    monkeypatch.setattr(json_schema, "schema_problem", looked_at)
    monkeypatch.setattr(json_schema, "value_problem", looked_at)
    task = await yard.api().create_task(json_schema={"type": "object"})
    run = await yard.api().create_run(task)
    ok(await run.api.patch(f"tasks/{run.task_id}/", {"json_schema": {"type": "array"}}))
    ok(await run.api.patch(run.path("set_output/"), {"output": []}))
    assert held == [[], [], []]


@pytest.mark.parametrize("schema", [{"$schema": 3}, {"pattern": "("}, nested(400)])
async def test_no_schema_is_refused_when_it_is_written(yard: Yard, schema: Any) -> None:
    error(await yard.api().post("tasks/", {"json_schema": schema}), 400, "invalid_input", "json_schema")
    task = await yard.api().create_task(title="x")
    response = await yard.api().patch(f"tasks/{task['id']}/", {"json_schema": schema})
    error(response, 400, "invalid_input", "json_schema")
