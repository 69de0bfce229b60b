"""The structured result of a run whose task has a schema (tasks-api §2.5, §5.5): what can be one, and the tool for it.

The schema that the tool shows is for the agent to read; what it sends is checked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from taskyard import json_schema
from taskyard.agents.adapters import GATEWAY
from taskyard.environments.mcp import OWN_SERVER
from taskyard.errors import InvalidInputError
from taskyard.gateway.mcp import PATH
from taskyard.gateway.server import Tool, ToolAnswer
from taskyard.schemas import check_storable

Json = dict[str, Any]

SERVER: Json = {"type": "http", "name": OWN_SERVER, "url": GATEWAY + PATH, "headers": []}
"""The MCP server with the tool, as ACP's `mcpServers` has it."""
TOOL = "submit_result"
HINT = (
    f"(Taskyard: this task ends with a structured result. When the work is done, give it with the tool {TOOL} of the"
    f" MCP server {OWN_SERVER}, whose input schema says what is wanted; then end your turn.)"
)

TAKEN = (
    "The result was taken. The run is completed when you end your turn; until then, another call replaces it."
)

MAX_DEPTH = 64
MAX_SAID = 2000
"""Characters of what an agent is told of a problem, which may quote its whole value."""

# Model APIs refuse these at the top of a tool's schema, and other names of properties.
_NOT_AT_THE_TOP = frozenset(
    {"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "enum", "const", "$ref", "$dynamicRef"}
)
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
"""What model APIs take tools' schemas for."""


async def problem_of(schema: Any, value: Any) -> str | None:
    """Why a value that an agent said cannot be the output of a run, beginning with where; None when it can."""
    if _deeper(value, MAX_DEPTH):
        return f"$: {json_schema.TOO_DEEP}"
    try:
        check_storable(value)
        json.dumps(value, allow_nan=False)
    except InvalidInputError as error:
        return f"$: a text has characters that cannot be stored. {error.detail}"
    except ValueError:
        return "$: a number is too large."
    return await json_schema.value_problem(schema, value, placed=True)


async def submit_tool(schema: Json, take: Callable[[Any], Awaitable[str | None]]) -> Tool:
    """The tool for a task's schema. take: is given what the agent sends; says why it is not taken, or None."""
    shown, whole = await _input_schema(schema)

    async def call(arguments: Json) -> ToolAnswer:
        if whole:
            problem = await take(arguments)
        elif arguments.keys() == {"result"}:
            problem = await take(arguments["result"])
        else:
            problem = "Call the tool with one argument, `result`."
        if problem is None:
            return ToolAnswer(TAKEN)
        if len(problem) > MAX_SAID:
            problem = problem[:MAX_SAID] + "…"
        return ToolAnswer(f"The result was not taken. {problem}", failed=True)

    what = "The arguments are the result" if whole else "The argument `result` is the result"
    description = (
        f"Gives the structured result of this task, and must be called before the work ends. {what}, and must fit the"
        " schema, which the server checks: when it answers with a problem, correct the result and call again. The last"
        " result that fits counts, and the run is completed when the turn ends."
    )
    if shown is None:
        shown = _wrapped({})
        if not _deeper(schema, MAX_DEPTH):
            description += f" The schema of `result` is: {json.dumps(schema)}"
    return Tool(TOOL, description, shown, call)


async def _input_schema(schema: Json) -> tuple[Json | None, bool]:
    """What agents are shown as the schema of the tool's arguments, and whether these are the result itself.

    None when a model API could refuse it, with each call of the model: then the schema is told in words.
    """
    if _deeper(schema, MAX_DEPTH):
        return None, False
    whole = schema.get("type") == "object" and not schema.keys() & _NOT_AT_THE_TOP and _plain_names(schema)
    bare = {name: value for name, value in schema.items() if name not in ("$schema", "$id")}
    shown = bare if whole else _wrapped(_moved(bare))
    if await json_schema.schema_problem({**shown, "$schema": _DRAFT}) is not None:
        return None, False
    return shown, whole


def _plain_names(schema: Json) -> bool:
    names = schema.get("properties", {})
    return isinstance(names, dict) and all(re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) for name in names)


def _wrapped(schema: Json) -> Json:
    return {
        "type": "object",
        "properties": {"result": schema},
        "required": ["result"],
        "additionalProperties": False,
    }


def _moved(value: Any) -> Any:
    """The schema as it reads below `properties.result` of another: references to its own parts lead there."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {name: _moved(item) for name, item in value.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = f"#/properties/result{target[1:]}"
    return moved


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects lie in each other more than `limit` times."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and (limit == 0 or any(_deeper(item, limit - 1) for item in value))
