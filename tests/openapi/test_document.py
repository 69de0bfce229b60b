"""The document is well formed, and says what the models and the contract say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from taskyard.idempotency import KEYED
from taskyard.openapi.document import OPERATIONS, REFUSALS, TAGS, document, keyed, refusals
from taskyard.openapi.operation import Operation
from taskyard.openapi.requests import BY_HAND
from taskyard.schemas import parse

DOCUMENT = document()


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    found = set(references(DOCUMENT))
    components = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses")
        for name in DOCUMENT["components"][kind]
    }

    assert found <= components
    unused = {name.rpartition("/")[2] for name in components - found}
    assert unused <= {REFUSALS[503][0]} | {"TaskRunErrorResponse"}


def test_schemas_are_json_schemas() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert "enum" not in schema, f"{name}: enumerations stand where they are used"


def test_operations_have_ids_of_their_own_and_known_tags() -> None:
    ids = [operation.id for operation in OPERATIONS]

    assert len(ids) == len(set(ids))
    assert {operation.tag for operation in OPERATIONS} == TAGS.keys()


def test_path_parameters_are_those_of_the_path() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            said = [item["name"] for item in operation.get("parameters", ()) if item["in"] == "path"]
            assert said == re.findall(r"{(\w+)}", path)


@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS if operation.request is not None],
    ids=lambda operation: str(operation.id),
)
def test_examples_are_accepted(operation: Operation) -> None:
    request = operation.request
    assert request is not None
    assert request.example is not None
    parse(request.model, "application/json", json.dumps(request.example).encode())
    schemas = {"components": DOCUMENT["components"], "$ref": f"#/components/schemas/{request.name}"}
    Draft202012Validator(schemas).validate(request.example)


def test_bodies_that_may_be_missing_are_those_without_required_fields() -> None:
    for operation in OPERATIONS:
        if operation.request is not None:
            needed = any(field.is_required() for field in operation.request.model.model_fields.values())
            assert operation.request.required == needed, operation.id


def test_schemas_by_hand_are_of_fields_that_exist() -> None:
    for model, field in BY_HAND:
        assert field in model.model_fields, f"{model.__name__}.{field}"


def test_null_is_allowed_exactly_where_it_is_accepted() -> None:
    schemas = DOCUMENT["components"]["schemas"]

    assert schemas["TaskRunBootstrapCreateRequest"]["properties"]["model"] == {
        "type": "string",
        "minLength": 1,
    }
    branch = schemas["TaskRunBootstrapCreateRequest"]["properties"]["branch"]
    assert {"type": "null"} in branch["anyOf"]


def test_additions_of_ours_say_what_they_are() -> None:
    """Nobody can look them up anywhere else."""
    schemas = DOCUMENT["components"]["schemas"]
    own = [
        (name, field)
        for name in (
            "ClaudeTaskRunCreateSchema",
            "TaskRunResumeRequestSchema",
            "TaskRunBootstrapCreateRequest",
        )
        for field in ("priority", "budget_cost", "budget_tokens", "allowed_models")
    ]
    own += [("TaskRunBootstrapCreateRequest", "agent"), ("TaskRunCommandRequest", "method")]
    own += [
        (name, field)
        for field in ("worker_pool", "setup_script", "mcp_servers", "image")
        for name in ("SandboxEnvironmentRequest", "PatchedSandboxEnvironment", "SandboxEnvironment")
    ]
    own += [("SandboxEnvironmentListItem", "worker_pool")]
    for name, field in own:
        assert len(schemas[name]["properties"][field].get("description", "")) > 20, f"{name}.{field}"
    state = schemas["TaskRunDetail"]["properties"]["state"]["description"]
    keys = {
        "queue",
        "suspended",
        "cost",
        "token_usage",
        "error_type",
        "priority",
        "budget_cost",
        "allowed_models",
    }
    assert keys <= set(re.findall(r"`(\w+)`", state))
    assert "`steer`" in schemas["TaskRunCommandRequest"]["properties"]["method"]["description"]


def test_a_partial_update_has_no_defaults() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if name.startswith("Patched"):
            assert not any("default" in field for field in schema["properties"].values()), name


def test_idempotency_keys_are_described() -> None:
    with_key = [operation for operation in OPERATIONS if keyed(operation)]

    assert len(with_key) == len(KEYED)
    assert all({400, 422} <= refusals(operation) for operation in with_key)


def test_answers_are_closed_for_tests_only() -> None:
    assert document(closed=True)["components"]["schemas"]["Task"]["additionalProperties"] is False
    assert "additionalProperties" not in DOCUMENT["components"]["schemas"]["Task"]


def test_links_lead_to_operations_with_these_parameters() -> None:
    by_id = {operation.id: operation for operation in OPERATIONS}
    found = 0
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            for answer in operation["responses"].values():
                for link in answer.get("links", {}).values():
                    found += 1
                    path = by_id[link["operationId"]].path
                    assert set(re.findall(r"{(\w+)}", path)) == link["parameters"].keys()
    assert found > 40
