"""One operation of the API, as the tables of this room describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from taskyard.openapi.shapes import Shape
from taskyard.schemas import Body

Json = dict[str, Any]

Access = Literal["task:read", "task:write", "*", "user", "session", "run token", "signature", "anybody"]
"""What a request needs: a scope in a project; any user; a signed-in browser; a token for one run; a signed
URL; nothing."""

PROJECT = "/api/projects/{project_id}/"
TASK = PROJECT + "tasks/{task_id}/"
RUN = TASK + "runs/{id}/"


@dataclass(frozen=True)
class Answer:
    """An answer that is not a refusal, or a refusal of an operation's own."""

    shape: type[Shape] | None = None
    """None: no object that is described."""
    media: str | None = "application/json"
    """None: no body. Several are separated by commas."""
    schema: Json | None = None
    """Instead of a shape."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names and descriptions."""
    text: str = ""


@dataclass(frozen=True)
class Request:
    """The body of a request."""

    name: str
    """The name of its schema."""
    model: type[Body]
    required: bool = True
    example: Any = None
    parts: Mapping[type[Body], str] = field(default_factory=dict)
    """The names of the schemas of its parts."""


@dataclass(frozen=True)
class Parameter:
    name: str
    schema: Json
    text: str = ""
    required: bool = False
    where: Literal["query", "header", "path"] = "query"


@dataclass(frozen=True)
class Operation:
    id: str
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    summary: str
    access: Access
    answers: Mapping[int, Answer]
    request: Request | None = None
    query: tuple[Parameter, ...] = ()
    text: str = ""
    content: tuple[str, Json] | None = None
    """Media type and schema of a body that is no JSON, in place of `request`."""
    refuses: frozenset[int] = frozenset()
    """Refusals besides those that follow from access, path and body."""
    otherwise: Mapping[int, type[Shape]] = field(default_factory=dict)
    """Refusals that look like this at times, without the four keys of `Error`."""

    @property
    def tag(self) -> str:
        if not self.path.startswith("/api/"):
            return "oauth" if "oauth" in self.path else "server"
        parts = [part for part in self.path.split("/")[2:] if part and not part.startswith("{")]
        if self.path.startswith(PROJECT) and len(parts) > 1:
            return "runs" if parts[1] == "tasks" and "run" in "".join(parts[2:3]) else parts[1]
        return {"environments": "integrations", "schema": "server", "code": "users", "logs": "runs"}.get(
            parts[0], parts[0]
        )


def page_parameters(limit: int = 100) -> tuple[Parameter, ...]:
    """`limit` and `offset` of a list: wrong values count as missing, large ones are cut."""
    return (
        Parameter("limit", {"type": "integer"}, f"How many to answer: 50 when missing, {limit} at most."),
        Parameter("offset", {"type": "integer"}, "How many to leave out at the start."),
    )
