"""The tool for a structured result: the schema that an agent is shown, and what of its calls is taken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from taskyard import json_schema
from taskyard.drive.result import MAX_DEPTH, MAX_SAID, problem_of, submit_tool
from taskyard.gateway.server import Tool, ToolAnswer

Json = dict[str, Any]
OBJECT: Json = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class Taken:
    """Takes what fits, as a run does."""

    def __init__(self, schema: Json) -> None:
        self.schema = schema
        self.values: list[Any] = []

    async def take(self, value: Any) -> str | None:
        if (problem := await problem_of(self.schema, value)) is None:
            self.values.append(value)
        return problem


async def made(schema: Json) -> tuple[Tool, Taken]:
    taken = Taken(schema)
    tool = await submit_tool(schema, taken.take)
    Draft202012Validator.check_schema(tool.input_schema)
    assert tool.input_schema["type"] == "object"
    return tool, taken


async def test_an_object_is_the_arguments_themselves() -> None:
    tool, taken = await made({"$schema": "https://json-schema.org/draft/2020-12/schema", **OBJECT})
    assert tool.input_schema == OBJECT
    assert not (await tool.call({"n": 1})).failed
    assert await tool.call({"n": "x"}) == ToolAnswer(
        "The result was not taken. $.n: 'x' is not of type 'integer'", failed=True
    )
    assert taken.values == [{"n": 1}]


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "array"},
        {"type": ["object", "null"]},
        {"anyOf": [OBJECT, {"type": "null"}]},
        {"type": "object", "oneOf": [OBJECT, {"required": ["m"]}]},
        {"type": "object", "properties": {"with space": {}}},
        {"type": "object", "properties": {"x" * 65: {}}},
    ],
)
async def test_what_a_model_api_would_refuse_is_put_into_an_argument(schema: Json) -> None:
    tool, taken = await made(schema)
    assert tool.input_schema == {
        "type": "object",
        "properties": {"result": schema},
        "required": ["result"],
        "additionalProperties": False,
    }
    for arguments in ({}, {"n": 1}, {"result": {"n": 1}, "more": 2}):
        assert await tool.call(arguments) == ToolAnswer(
            "The result was not taken. Call the tool with one argument, `result`.", failed=True
        )
    assert taken.values == []


async def test_references_lead_to_the_same_parts() -> None:
    tree = {
        "$id": "https://example.org/tree",
        "$defs": {"leaf": {"type": "string"}},
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#"}]},
    }
    tool, taken = await made(tree)
    shown = Draft202012Validator(tool.input_schema)
    for value in (["a", ["b", []]], [1], ["a", [["b", 2]]], "a"):
        fits = await problem_of(tree, value) is None
        assert shown.is_valid({"result": value}) is fits
        assert (await tool.call({"result": value})).failed is not fits
    assert taken.values == [["a", ["b", []]]]


def nested(depth: int) -> Json:
    schema: Json = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        # As the fourth draft had it: an array of schemas, and a limit that is none by itself.
        ({"type": "object", "properties": {"a": {"items": [{"type": "string"}]}}}, True),
        ({"type": "object", "properties": {"a": {"minimum": 1, "exclusiveMinimum": True}}}, True),
        (nested(2 * MAX_DEPTH), False),
    ],
)
async def test_a_schema_that_breaks_the_calls_of_the_model_is_told_in_words(schema: Json, told: bool) -> None:
    tool, _ = await made(schema)
    assert tool.input_schema["properties"] == {"result": {}}
    assert (json.dumps(schema) in tool.description) is told


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("inf"), "$: a number is too large."),
        ({"a": float("nan")}, "$: a number is too large."),
        ("a\0b", "$: a text has characters that cannot be stored. Null characters are not allowed."),
        ({"\ud800": 1}, "$: a text has characters that cannot be stored. Not a valid string."),
        (json.loads("[" * 900 + "]" * 900), f"$: {json_schema.TOO_DEEP}"),
        (json.loads('{"a":' * 900 + "1" + "}" * 900), f"$: {json_schema.TOO_DEEP}"),
        (json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH), None),
        (None, None),
    ],
)
async def test_values_that_cannot_be_kept(value: Any, problem: str | None) -> None:
    assert await problem_of({}, value) == problem


async def test_a_problem_is_told_in_short() -> None:
    tool, _ = await made(OBJECT)
    answer = await tool.call({"n": "x" * 100_000})
    assert answer.failed
    assert len(answer.text) < MAX_SAID + 100


@pytest.mark.parametrize("schema", [{"items": {"type": "string"}}, {"items": {"pattern": "^a"}}])
async def test_the_place_of_a_problem(schema: Json) -> None:
    """Found here and now, or in a process."""
    problem = await json_schema.value_problem(
        schema, ["a", 3 if "type" in schema["items"] else "b"], placed=True
    )
    assert problem is not None
    assert problem.startswith("$[1]: ")
