"""The description against the facts about the API that it is compatible with: every difference has a reason.

`facts.json` has method, path, query, bodies and answers of each operation, and the fields of each schema.
TASKYARD_TEST_OPENAPI_FACTS names a newer file of the same kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from taskyard.openapi.document import OPERATIONS, document
from tests.openapi.differences import EXPLAINED

Json = dict[str, Any]

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]
LIMITS = {"max_length": "maxLength", "min_length": "minLength", "minimum": "minimum", "maximum": "maximum"}
HANDLED = {*LIMITS, "type", "ref", "enum", "nullable", "items", "values", "format", "default", "required"}
LEFT_OUT = {
    "read_only": "bodies and answers have schemas of their own here",
    "write_only_in_client": "the same",
    "blank_allowed": "the empty text is one of the enumeration here",
}


def facts() -> Json:
    path = os.environ.get("TASKYARD_TEST_OPENAPI_FACTS")
    return dict(json.loads((Path(path) if path else Path(__file__).with_name("facts.json")).read_text()))


def kind(schema: Json) -> Json:
    """One of our schemas in the words of the facts."""
    parts = [part for part in schema.get("anyOf", [schema]) if part != {"type": "null"}]
    nullable = len(parts) < len(schema.get("anyOf", [schema]))
    if len(parts) > 1:
        return {"one_of": [kind(part) for part in parts]}
    part = {**schema, **parts[0]}
    types = part.get("type", "any")
    if isinstance(types, list):
        nullable, rest = "null" in types, [name for name in types if name != "null"]
        types = rest[0] if len(rest) == 1 else "any"
    found: Json = {"ref": part["$ref"].rpartition("/")[2]} if "$ref" in part else {"type": types}
    if nullable:
        found["nullable"] = True
    for theirs, ours in {**LIMITS, "enum": "enum", "format": "format", "default": "default"}.items():
        if ours in part:
            found[theirs] = part[ours]
    if "items" in part:
        found["items"] = kind(part["items"])
    if isinstance(part.get("additionalProperties"), dict):
        found["values"] = kind(part["additionalProperties"])
    return found


def compare(where: str, theirs: Json, ours: Json) -> Iterator[str]:
    """The differences of two types."""
    for name in sorted(theirs.keys() | ours.keys()):
        then, now = theirs.get(name), ours.get(name)
        if name in LEFT_OUT or (name == "values" and then == {"type": "any"}) or then == now:
            continue
        if name == "nullable" and "any" in (theirs.get("type"), ours.get("type")):
            continue  # null is a value, too
        if name in ("items", "values") and then is not None and now is not None:
            yield from compare(f"{where}[]", then, now)
        elif name == "enum" and then is not None and now is not None:
            yield from (f"{where}: +{value!r}" for value in now if value not in then)
            yield from (f"{where}: -{value!r}" for value in then if value not in now)
        else:
            yield f"{where}: {name} {then!r} -> {now!r}"


def of_schema(name: str, theirs: Json) -> Iterator[str]:
    ours = SCHEMAS.get(name)
    if ours is None:
        yield f"{name}: missing"
        return
    if "one_of" in theirs:
        yield from compare(name, {"one_of": theirs["one_of"]}, kind(ours))
        return
    fields, required = ours["properties"], set(ours.get("required", ()))
    for field, then in theirs["fields"].items():
        if field not in fields:
            yield f"{name}.{field}: missing"
            continue
        known = {key: value for key, value in then.items() if key != "required"}
        yield from compare(f"{name}.{field}", known, kind(fields[field]))
        if then.get("required", False) != (field in required):
            yield f"{name}.{field}: required {then.get('required', False)} -> {field in required}"
    for field in fields.keys() - theirs["fields"].keys():
        yield f"{name}.{field}: added"


def of_operation(name: str, theirs: Json) -> Iterator[str]:
    operation = next((operation for operation in OPERATIONS if operation.id == name), None)
    if operation is None:
        yield f"{name}: missing"
        return
    made = DOCUMENT["paths"].get(theirs["path"], {}).get(theirs["method"].lower())
    if made is None or made["operationId"] != name:
        yield f"{name}: {theirs['method']} {theirs['path']} -> {operation.method} {operation.path}"
        return
    if theirs["scope"] != operation.access:
        yield f"{name}: scope {theirs['scope']} -> {operation.access}"
    body = operation.request.name if operation.request else None
    if theirs.get("body") != body:
        yield f"{name}: body {theirs.get('body')} -> {body}"
    query = {item["name"]: item for item in made.get("parameters", ()) if item["in"] == "query"}
    for parameter, then in theirs["query"].items():
        if parameter not in query:
            yield f"{name}?{parameter}: missing"
            continue
        known = {key: value for key, value in then.items() if key != "required"}
        yield from compare(f"{name}?{parameter}", known, kind(query[parameter]["schema"]))
        if then["required"] != query[parameter]["required"]:
            yield f"{name}?{parameter}: required {then['required']} -> {query[parameter]['required']}"
    for parameter in query.keys() - theirs["query"].keys():
        yield f"{name}?{parameter}: added"
    for status, then in theirs["responses"].items():
        yield from _answer(name, status, then, made["responses"].get(status))


def _answer(name: str, status: str, theirs: Json, ours: Json | None) -> Iterator[str]:
    if ours is None:
        yield f"{name} {status}: missing"
        return
    if theirs.get("type") == "none" and status >= "400":
        return  # they do not say what it looks like
    if "$ref" in ours:
        ours = DOCUMENT["components"]["responses"][ours["$ref"].rpartition("/")[2]]
    content = list(ours.get("content", {}).values())
    if theirs.get("type") in ("none", "text", "binary"):
        plain = not content if theirs["type"] == "none" else "$ref" not in content[0]["schema"]
        if not plain:
            yield f"{name} {status}: {theirs['type']} -> {kind(content[0]['schema'])}"
        return
    now = kind(content[0]["schema"])
    if now != theirs:
        shown = " | ".join(part["ref"] for part in now.get("one_of", [now]))
        yield f"{name} {status}: {theirs['ref']} -> {shown}"


def differences() -> list[str]:
    found: list[str] = []
    known = facts()
    for name, theirs in known["operations"].items():
        found += of_operation(name, theirs)
    for name, theirs in known["schemas"].items():
        found += of_schema(name, theirs)
    return sorted(found)


def test_the_facts_say_nothing_that_is_not_compared() -> None:
    said = {
        key
        for schema in facts()["schemas"].values()
        for field in schema.get("fields", {}).values()
        for key in field
    }

    assert said <= HANDLED | LEFT_OUT.keys()


def test_every_difference_is_explained_and_every_explanation_applies() -> None:
    explained = [difference for group in EXPLAINED.values() for difference in group]
    found = differences()

    assert [difference for difference in found if difference not in explained] == []
    assert [difference for difference in explained if difference not in found] == []
    assert len(explained) == len(set(explained))


def test_an_unknown_difference_would_be_found() -> None:
    """The comparison itself: what it says about a changed type, limit, field, scope and answer."""
    task = {"fields": {"title": {"type": "integer"}, "gone": {"type": "string"}}}
    said = set(of_schema("Task", task))

    assert "Task.title: type 'integer' -> 'string'" in said
    assert "Task.title: max_length None -> 255" in said
    assert "Task.gone: missing" in said
    assert "Task.slug: added" in said
    moved = {
        **facts()["operations"]["tasks_list"],
        "scope": "task:write",
        "responses": {"200": {"ref": "Task"}},
    }
    said = set(of_operation("tasks_list", moved))
    assert "tasks_list: scope task:write -> task:read" in said
    assert "tasks_list 200: Task -> PaginatedTaskList" in said


if __name__ == "__main__":
    print("\n".join(differences()))
