"""JSON Schemas that people write: is it one, and does a value fit it? (tasks-api §2.5, §5.5)

Both can take for ever: a `pattern` that backtracks, references that double, `uniqueItems`. What is small and plain is
looked at here and now; everything else in a process of its own with limits of time and memory. That process runs this
file by its path, so nothing of the server is imported here.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from typing import Any

CPU_S = 3
"""Seconds of CPU that a check may take, with the start of its process."""
WALL_S = 30.0
"""Seconds that it may take on a busy machine."""
MEMORY_BYTES = 1 << 30
AT_ONCE = 2
"""Checks in processes at once, of one server process; more wait."""

SMALL = 2_000
"""Characters of a schema that is looked at at once when it is written: 10 ms, more on a busy machine."""
SMALL_WORK = 300_000
"""Characters of a schema times those of a value, up to which a plain schema is applied at once: 40 ms at worst."""
MAX_DEPTH = 20
"""Of a plain schema."""
PLAIN = frozenset(
    {
        *(
            "$schema",
            "$id",
            "title",
            "description",
            "default",
            "examples",
            "deprecated",
            "readOnly",
            "writeOnly",
        ),
        *("type", "enum", "const", "properties", "required", "additionalProperties", "items"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "format"),
    }
)
"""Keywords whose work grows with the schema and the value only."""
TOO_MUCH = (
    f"checking it takes more than {CPU_S} seconds or too much memory: "
    "make json_schema simpler, or the value smaller"
)
TOO_DEEP = "the value or the schema is nested too deeply"


async def schema_problem(schema: Any) -> str | None:
    """Why a value is not a JSON Schema; None when it is one."""
    try:
        if len(json.dumps(schema, allow_nan=False)) <= SMALL:
            return schema_problem_now(schema)
        return await _apart([schema])
    except RecursionError:
        return TOO_DEEP
    except ValueError:  # such as 1e999, which was read as infinity, and cannot be kept
        return "a number in it is too large"


async def value_problem(schema: Any, value: Any, *, placed: bool = False) -> str | None:
    """Why a value does not fit a schema; None when it does. placed: beginning with where, as in `$.items[2]: …`."""
    try:
        work = len(json.dumps(schema)) * len(json.dumps(value))
        if work <= SMALL_WORK and _is_plain(schema):
            return value_problem_now(schema, value, placed)
        return await _apart([schema, value, placed])
    except RecursionError:
        return TOO_DEEP


def schema_problem_now(schema: Any) -> str | None:
    """As `schema_problem`, for as long as it takes."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    if not isinstance(schema.get("$schema", "") if isinstance(schema, dict) else "", str):
        return "$schema is not a text"
    try:
        # An unknown `$schema` counts as the newest draft, as jsonschema has it for now, with a warning.
        validator_for(schema, Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return str(error.message)
    except RecursionError:
        return TOO_DEEP
    return None


def value_problem_now(schema: Any, value: Any, placed: bool = False) -> str | None:
    """As `value_problem`, for as long as it takes.

    References lead to the schema itself and to the published meta-schemas, never to the network: the server
    must not be sent anywhere by a task.
    """
    import re

    from jsonschema.exceptions import SchemaError, UnknownType, best_match
    from jsonschema.validators import Draft202012Validator, validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    try:
        validator = validator_for(schema, Draft202012Validator)(schema, registry=REGISTRY)
        error = best_match(validator.iter_errors(value))
    except Unresolvable as broken:
        return f"json_schema refers to something that is not in it: {broken}"
    except RecursionError:
        return TOO_DEEP
    except (SchemaError, UnknownType, re.error, TypeError, AttributeError, ArithmeticError, ValueError):
        # What was written before schemas were checked, or what only the meta-schema of another draft allows.
        return "json_schema cannot be applied to it"
    if error is None:
        return None
    return f"{error.json_path}: {error.message}" if placed else str(error.message)


def _is_plain(schema: Any, depth: int = 0) -> bool:
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return isinstance(schema, bool)
    parts = schema.get("properties", {})
    if not schema.keys() <= PLAIN or not isinstance(parts, dict):
        return False
    below = [*parts.values(), schema.get("items", True), schema.get("additionalProperties", True)]
    return all(_is_plain(part, depth + 1) for part in below)


_free: asyncio.Semaphore | None = None
_loop: asyncio.AbstractEventLoop | None = None


def _places() -> asyncio.Semaphore:
    """The places for checks of this event loop, of which a server has one and tests have many."""
    global _free, _loop
    loop = asyncio.get_running_loop()
    if _free is None or _loop is not loop:
        _free, _loop = asyncio.Semaphore(AT_ONCE), loop
    return _free


async def _apart(parts: list[Any]) -> str | None:
    """The same in a process of its own, which knows nothing and is ended when it takes too long."""
    async with _places():
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            __file__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
        )
        try:
            async with asyncio.timeout(WALL_S):
                output, _ = await process.communicate(json.dumps(parts).encode())
        except TimeoutError:
            return TOO_MUCH
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode != 0:
        return TOO_MUCH
    problem: str | None = json.loads(output)
    return problem


def _main() -> None:
    """The process: a JSON array of what the check takes comes in, the problem or null goes out."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    parts = json.load(sys.stdin)
    problem = schema_problem_now(*parts) if len(parts) == 1 else value_problem_now(*parts)
    json.dump(problem, sys.stdout)


if __name__ == "__main__":
    _main()
