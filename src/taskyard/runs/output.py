"""Structured output: does a value fit a task's JSON Schema? (tasks-api §5.5)"""

from __future__ import annotations

from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from referencing.exceptions import Unresolvable


def problem_of(schema: Any, value: Any) -> str | None:
    """Why a value does not fit a schema; None when it does.

    References lead to the schema itself and to the published meta-schemas, never to the network: the server
    must not be sent anywhere by a task.
    """
    try:
        validator = validator_for(schema)(schema, registry=REGISTRY)
        error = best_match(validator.iter_errors(value))
    except SchemaError as broken:
        return f"json_schema is not a valid JSON Schema: {broken.message}"
    except Unresolvable as broken:
        return f"json_schema refers to something that is not in it: {broken}"
    except RecursionError:
        return "the value or the schema is nested too deeply"
    return None if error is None else str(error.message)
