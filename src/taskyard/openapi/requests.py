"""JSON Schemas of request bodies, out of the models that parse them, so that the two cannot drift apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from taskyard.accounts.schemas import SCOPES, KeyWrite
from taskyard.agents.adapters import CONTRACT_MODES
from taskyard.artifacts.limits import MAX_BYTES
from taskyard.artifacts.schemas import Finalize, Inline, InlineItem, Prepare, PrepareItem
from taskyard.commands.schemas import Command
from taskyard.environments.mcp import NAME, McpServer
from taskyard.openapi.operation import Json, Operation
from taskyard.runs.schemas import AppendLog, RunFields
from taskyard.schemas import Body, Filled, NotNull
from taskyard.tasks.schemas import TaskWrite

REF = "#/components/schemas/"

BY_HAND: Mapping[tuple[type[BaseModel], str], Json] = {
    (AppendLog, "entries"): {"items": {"type": "object"}, "minItems": 1},
    (Command, "id"): {"type": ["string", "number", "null"]},
    (Finalize, "artifacts"): {"minItems": 1},
    (Inline, "artifacts"): {"minItems": 1},
    (InlineItem, "content"): {"format": None},
    (KeyWrite, "scopes"): {"items": {"type": "string", "enum": list(SCOPES)}},
    (McpServer, "name"): {"pattern": NAME},
    (Prepare, "artifacts"): {"minItems": 1},
    (PrepareItem, "size"): {"minimum": 1, "maximum": MAX_BYTES},
    (RunFields, "github_user_token"): {"writeOnly": True},
    (TaskWrite, "json_schema"): {"type": ["object", "null"], "description": "A JSON Schema."},
}
"""What the types of some fields leave to their validators. None takes something away."""

_not_blank = get_args(Filled)[1].func
_not_null = NotNull.func


class Generator(GenerateJsonSchema):
    """Pydantic's schemas without its titles, and with what validators of `schemas.py` check."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 - as in the base class

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        inner = self.generate_inner(schema["schema"])
        check = cast("Any", schema["function"]["function"])
        if check is _not_null:
            return without_null(inner)
        if check is _not_blank and inner.get("type") == "string":
            return {**inner, "minLength": 1}
        return inner

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        result = super().default_schema(schema)
        if result.get("default", ...) is None:
            del result["default"]  # None stands for "not sent"
        return result


def without_null(schema: JsonSchemaValue) -> JsonSchemaValue:
    rest = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    if not rest:
        return schema
    others = {name: value for name, value in schema.items() if name != "anyOf"}
    return {**others, **rest[0]} if len(rest) == 1 else {**others, "anyOf": rest}


def request_schemas(operations: Iterable[Operation]) -> dict[str, Json]:
    """The schemas of all bodies by name, with those of their parts."""
    named: dict[str, tuple[type[BaseModel], Mapping[type[Body], str]]] = {}
    partial = set()
    for operation in operations:
        if (request := operation.request) is not None:
            named[request.name] = request.model, request.parts
            named |= {name: (part, {}) for part, name in request.parts.items()}
            if operation.method in ("PUT", "PATCH"):
                partial.add(request.name)
    models = sorted({model for model, _ in named.values()}, key=lambda model: model.__qualname__)
    keys, made = models_json_schema(
        [(model, "validation") for model in models],
        ref_template=REF + "{model}",
        schema_generator=Generator,
    )
    key_of = {model: keys[model, "validation"]["$ref"].removeprefix(REF) for model in models}
    schemas = {}
    for name, (model, parts) in named.items():
        nested = {key_of[part]: part_name for part, part_name in parts.items()}
        schema = _settle(made["$defs"][key_of[model]], made["$defs"], nested)
        for (owner, field), more in BY_HAND.items():
            if issubclass(model, owner):
                whole = {**schema["properties"][field], **more}
                schema["properties"][field] = {key: item for key, item in whole.items() if item is not None}
        if name in partial:  # what is not sent stays as it is, so there are no defaults
            for field_schema in schema.get("properties", {}).values():
                field_schema.pop("default", None)
        schema.pop("title", None)
        schema.pop("description", None)  # written for readers of the code
        schemas[name] = schema
    return schemas | _runtimes(schemas["TaskRunCreateRequestSchema"]["properties"])


def _settle(value: Any, definitions: Mapping[str, Json], nested: Mapping[str, str]) -> Any:
    """Enumerations stand where they are used; other references get their names."""
    if isinstance(value, list):
        return [_settle(item, definitions, nested) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        key = value["$ref"].removeprefix(REF)
        rest = {name: item for name, item in value.items() if name != "$ref"}
        target = definitions[key]
        if "enum" in target or "const" in target:
            return {"type": target["type"], "enum": target.get("enum", [target.get("const")]), **rest}
        return {"$ref": REF + nested[key], **rest}
    if "const" in value:
        return {"type": value.get("type", "string"), "enum": [value["const"]], **{
            name: item for name, item in value.items() if name not in ("const", "type")
        }}  # fmt: skip
    return {name: _settle(item, definitions, nested) for name, item in value.items()}


def _runtimes(fields: Json) -> dict[str, Json]:
    """`POST …/run/` takes one flat object; its three uses are described apart, as clients know them."""
    made: dict[str, Json] = {}
    for adapter, name in (("claude", "ClaudeTaskRunCreateSchema"), ("codex", "CodexTaskRunCreateSchema")):
        own = {
            "runtime_adapter": {"type": "string", "enum": [adapter]},
            "initial_permission_mode": {"type": "string", "enum": list(CONTRACT_MODES[adapter])},
        }
        rest = {field: schema for field, schema in fields.items() if field != "agent"}
        made[name] = {"type": "object", "required": ["runtime_adapter", "model"], "properties": rest | own}
    runtime = ("runtime_adapter", "model", "reasoning_effort", "initial_permission_mode")
    rest = {field: schema for field, schema in fields.items() if field not in runtime}
    made["TaskRunResumeRequestSchema"] = {"type": "object", "properties": rest}
    return made | {"TaskRunCreateRequestSchema": {"anyOf": [{"$ref": REF + name} for name in made]}}
