"""The OpenAPI document, put together from the tables of operations, the models of bodies and the shapes of answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from taskyard import __version__
from taskyard.accounts.caller import CSRF_HEADER, SESSION_COOKIE
from taskyard.idempotency import KEYED, MAX_LENGTH
from taskyard.openapi import accounts, artifacts, environments, runs, shapes, tasks
from taskyard.openapi.links import links
from taskyard.openapi.operation import Answer, Json, Operation, Parameter
from taskyard.openapi.requests import REF, request_schemas

OPERATIONS: tuple[Operation, ...] = (
    *tasks.OPERATIONS,
    *runs.OPERATIONS,
    *artifacts.OPERATIONS,
    *environments.OPERATIONS,
    *accounts.OPERATIONS,
)

TAGS = {
    "tasks": "Pieces of work for agents.",
    "runs": "Attempts at tasks: their state, their record, and talking to their agents.",
    "sandbox_environments": "What the sandboxes of runs may reach and know.",
    "task_automations": "Tasks that are run by the clock.",
    "objects": "Content of files that this server keeps itself.",
    "repositories": "Git repositories under the names that tasks use.",
    "projects": "Projects.",
    "members": "Who belongs to a project.",
    "organizations": "Organizations.",
    "users": "The caller.",
    "personal_api_keys": "API keys, managed by a person in a browser.",
    "integrations": "Integrations, of which there are none yet.",
    "login": "Signing in with a password.",
    "logout": "Signing out.",
    "oauth": "OAuth 2 for other programs: authorization code with PKCE.",
    "server": "The server itself.",
}

DESCRIPTION = """Runs coding agents on tasks in locked sandboxes.

A slash at the end of a path may be left out. Texts are trimmed, unknown fields of a body are ignored, numbers are
taken as texts where a text is wanted. A body is checked before its subject is looked for. Times are UTC.
`project_id` is the number of a project, or `@current`. Besides the answers that are named, any operation may answer
500 or, when the database is down, 503, with an `Error`.
"""

REFUSALS = {
    400: ("BadRequest", "The request is wrong: `attr` names the field.", shapes.Error),
    401: ("Unauthorized", "No credential, or one that is not valid (any more).", shapes.Error),
    403: ("Forbidden", "The credential does not allow this.", shapes.Error),
    404: ("NotFound", "There is no such thing, or none that the caller may see.", shapes.Error),
    413: ("TooLarge", "The body is too large.", shapes.Error),
    415: ("UnsupportedMediaType", "The body is not JSON.", shapes.Error),
    422: ("Unprocessable", "The `Idempotency-Key` was used for another request.", shapes.Error),
    429: ("Throttled", "Too many requests: `Retry-After` says when to come again.", shapes.Error),
    503: ("Unavailable", "The server cannot do this right now.", shapes.Error),
}

UUID_TEXT = {"type": "string", "format": "uuid"}
IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    {"type": "string", "minLength": 1, "maxLength": MAX_LENGTH, "pattern": "^[ -~]+$"},
    "A request with a key is done once in 24 hours: the same one again gets the first answer.",
    where="header",
)


def document(*, closed: bool = False) -> Json:
    """The OpenAPI 3.1 document. `closed`: objects in answers may have no other keys, which is for tests;
    clients should expect that keys are added.
    """
    answers = {
        answer.shape for operation in OPERATIONS for answer in operation.answers.values() if answer.shape
    }
    schemas = {**_shape_schemas(answers, closed=closed), **request_schemas(OPERATIONS)}
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Taskyard",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {
                name: _response(Answer(shape, text=text), status)
                for status, (name, text, shape) in REFUSALS.items()
            },
            "securitySchemes": _security_schemes(),
        },
    }


def _operation(operation: Operation) -> Json:
    made: Json = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.text,
        "parameters": [_parameter(parameter) for parameter in _parameters(operation)],
        "requestBody": _body(operation),
        "responses": _responses(operation),
        "security": _security(operation),
    }
    return {name: value for name, value in made.items() if value or name == "security"}


def _parameters(operation: Operation) -> Iterable[Parameter]:
    for name in re.findall(r"{(\w+)}", operation.path):
        if name == "project_id":
            schema: Json = {"type": "string", "pattern": "^(@current|[0-9]{1,9})$", "examples": ["@current"]}
            yield Parameter(name, schema, "The number of a project, or `@current`.", True, "path")
        else:
            schema = {"type": "string"} if name == "key" else UUID_TEXT
            yield Parameter(name, schema, required=True, where="path")
    yield from operation.query
    if keyed(operation):
        yield IDEMPOTENCY_KEY


def keyed(operation: Operation) -> bool:
    """Whether `Idempotency-Key` counts for it. Names of path parameters differ, places do not."""
    places = re.sub(r"{\w+}", "{}", operation.path.rstrip("/"))
    return (operation.method, places) in {(method, re.sub(r"{\w+}", "{}", path)) for method, path in KEYED}


def _parameter(parameter: Parameter) -> Json:
    made = {
        "name": parameter.name,
        "in": parameter.where,
        "description": parameter.text,
        "required": parameter.required,
        "schema": parameter.schema,
    }
    return {name: value for name, value in made.items() if value or name == "required"}


def _body(operation: Operation) -> Json | None:
    if operation.content is not None:
        media, schema = operation.content
        return {"required": True, "content": {media: {"schema": schema}}}
    request = operation.request
    if request is None:
        return None
    content: Json = {"schema": {"$ref": REF + request.name}}
    if request.example is not None:
        content["example"] = request.example
    return {"required": request.required, "content": {"application/json": content}}


def refusals(operation: Operation) -> set[int]:
    """The statuses of refusals that follow from what an operation takes, and its own."""
    found = set(operation.refuses)
    if operation.request is not None:
        found |= {400, 413, 415}
    if operation.query and any(parameter.where == "query" for parameter in operation.query):
        found.add(400)
    found |= operation.otherwise.keys()
    if operation.access not in ("anybody", "signature"):
        found |= {401, 403}
    if operation.access in ("task:read", "task:write", "*", "user"):
        found.add(429)
    if "{" in operation.path and "{key}" not in operation.path:
        found.add(404)
    if keyed(operation):
        found |= {400, 422}
    return found


def _responses(operation: Operation) -> Json:
    made = {status: _response(answer, status) for status, answer in operation.answers.items()}
    for status in refusals(operation) - made.keys():
        made[status] = {"$ref": f"#/components/responses/{REFUSALS[status][0]}"}
    for status, response in made.items():
        if found := links(operation, status, OPERATIONS):
            response["links"] = found
    for status, shape in operation.otherwise.items():
        union = [{"$ref": REF + "Error"}, {"$ref": REF + shape.__name__}]
        made[status] = _response(Answer(schema={"anyOf": union}), status)
    return {str(status): made[status] for status in sorted(made)}


def _response(answer: Answer, status: int) -> Json:
    text = answer.text or ("Done." if status < 400 else REFUSALS[status][1])
    made: Json = {"description": text}
    if answer.media is not None:
        schema = {"$ref": REF + answer.shape.__name__} if answer.shape else answer.schema
        made["content"] = {media.strip(): {"schema": schema} for media in answer.media.split(",")}
    headers = dict(answer.headers)
    if status == 429:
        headers["Retry-After"] = "Seconds."
    if headers:
        made["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()
        }
    return made


def _security(operation: Operation) -> list[Json]:
    if operation.access in ("anybody", "signature"):
        return []
    if operation.access == "run token":
        return [{"RunToken": []}]
    if operation.access == "session":
        return [{"SessionCookie": []}]
    scopes = [] if operation.access == "user" else [operation.access]
    return [{"PersonalAPIKeyAuth": scopes}, {"OAuth2": scopes}, {"SessionCookie": []}]


def _security_schemes() -> Json:
    scopes = {"task:read": "Read tasks and runs.", "task:write": "Change them, and read them.", "*": "All."}
    flow = {
        "authorizationUrl": "/oauth/authorize",
        "tokenUrl": "/oauth/token",
        "refreshUrl": "/oauth/token",
        "scopes": scopes,
    }
    return {
        "PersonalAPIKeyAuth": {"type": "http", "scheme": "bearer", "description": "An API key, `phx_…`."},
        "OAuth2": {"type": "oauth2", "flows": {"authorizationCode": flow}},
        "SessionCookie": {
            "type": "apiKey",
            "in": "cookie",
            "name": SESSION_COOKIE,
            "description": f"A signed-in browser; writing needs the header `{CSRF_HEADER}`, too.",
        },
        "RunToken": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "A token for one run, from `connection_token/`.",
        },
    }


def _shape_schemas(used: Iterable[type[shapes.Shape]], *, closed: bool) -> dict[str, Json]:
    types = sorted({*used, shapes.Error, shapes.ErrorResponse, shapes.TaskRunErrorResponse}, key=repr)
    _, components = msgspec.json.schema_components(types, ref_template=REF + "{name}")
    enums = {name: schema for name, schema in components.items() if "enum" in schema}
    made = {
        name: _inline(schema, enums, closed=closed)
        for name, schema in components.items()
        if name not in enums
    }
    for schema in made.values():
        schema.pop("title", None)
        if not schema.get("required", True):
            del schema["required"]
    return made


def _inline(value: Any, enums: Mapping[str, Json], *, closed: bool) -> Any:
    """Enumerations stand where they are used; what is added to a reference stays beside it."""
    if isinstance(value, list):
        return [_inline(item, enums, closed=closed) for item in value]
    if not isinstance(value, dict):
        return value
    name = value.get("$ref", "").removeprefix(REF)
    if name in enums:
        return {"type": "string", "enum": enums[name]["enum"]}
    made = {
        key: _inline(item, enums, closed=closed)
        for key, item in value.items()
        if closed or (key, item) != ("additionalProperties", False)
    }
    if isinstance(made.get("enum"), list) and all(isinstance(item, str) for item in made["enum"]):
        made.setdefault("type", "string")
    return made
