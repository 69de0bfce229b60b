"""MCP servers of an environment: what a client sends, and what an agent gets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from taskyard.schemas import Body, Filled

Json = dict[str, Any]

MAX_SERVERS = 20
OWN_SERVER = "taskyard"
"""The name of the server's own tools (drive/result.py), which no other may have."""
NAME = r"^[A-Za-z0-9_.-]+$"
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

Words = Annotated[str, StringConstraints(max_length=10_000, strip_whitespace=False)]


class McpServer(Body):
    """A program in the sandbox, or a server that the sandbox's network reaches.

    `${NAME}` in a value stands for a variable of the environment, so that no secret has to be written here.
    """

    name: Annotated[Filled, StringConstraints(max_length=64, pattern=NAME)]
    type: Literal["stdio", "http", "sse"] = "stdio"
    command: Words = Field("", description="For `stdio`: a program, found in PATH or absolute.")
    args: Annotated[list[Words], Field(max_length=100)] = Field(default_factory=list)
    env: Annotated[dict[str, Words], Field(max_length=100)] = Field(default_factory=dict)
    url: Words = Field("", description="For `http` and `sse`.")
    headers: Annotated[dict[str, Words], Field(max_length=100)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "stdio":
            if not self.command.strip():
                raise PydanticCustomError("mcp_server", "A stdio server needs a command.")
            return self
        try:
            good = urlsplit(self.url).scheme in ("http", "https") and bool(urlsplit(self.url).hostname)
        except ValueError:
            good = False
        if not good:
            raise PydanticCustomError("mcp_server", "An http or sse server needs an http or https url.")
        return self

    def stored(self) -> Json:
        """As the database keeps it, and as it is shown: what belongs to its type."""
        names = ("command", "args", "env") if self.type == "stdio" else ("url", "headers")
        return {"name": self.name, "type": self.type, **{name: getattr(self, name) for name in names}}


def _different(servers: list[McpServer]) -> list[McpServer]:
    if len({server.name for server in servers}) != len(servers):
        raise PydanticCustomError("mcp_server", "Two servers have the same name.")
    if any(server.name == OWN_SERVER for server in servers):
        raise PydanticCustomError("mcp_server", f"The name '{OWN_SERVER}' is taken: choose another.")
    return servers


McpServers = Annotated[list[McpServer], Field(max_length=MAX_SERVERS), AfterValidator(_different)]


class UnknownVariableError(Exception):
    """A server refers to a variable that the environment does not have."""

    def __init__(self, server: str, name: str) -> None:
        super().__init__(
            f"The MCP server '{server}' refers to ${{{name}}}, and the sandbox environment has no such variable."
        )


def for_agent(servers: Sequence[Json], variables: Mapping[str, str]) -> list[Json]:
    """Stored servers as ACP's `mcpServers`. Raises UnknownVariableError."""
    return [_for_agent(server, variables) for server in servers]


def _for_agent(server: Json, variables: Mapping[str, str]) -> Json:
    def filled(text: str) -> str:
        def value(found: re.Match[str]) -> str:
            if found[1] not in variables:
                raise UnknownVariableError(server["name"], found[1])
            return variables[found[1]]

        return _REFERENCE.sub(value, text)

    def pairs(values: Mapping[str, str]) -> list[Json]:
        return [{"name": name, "value": filled(value)} for name, value in values.items()]

    if server["type"] == "stdio":
        return {
            "name": server["name"],
            "command": filled(server["command"]),
            "args": [filled(word) for word in server["args"]],
            "env": pairs(server["env"]),
        }
    return {
        "type": server["type"],
        "name": server["name"],
        "url": filled(server["url"]),
        "headers": pairs(server["headers"]),
    }
