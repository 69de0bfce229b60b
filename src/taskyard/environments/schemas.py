"""Bodies of the sandbox environment endpoints (tasks-api §9)."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from taskyard.environments.mcp import McpServers
from taskyard.schemas import Body, Filled, NotNull
from taskyard.settings import Pool

MAX_VALUE_BYTES = 100_000
"""Linux takes at most 128 KiB for one variable."""
MAX_VARIABLES_BYTES = 500_000
"""And an eighth of the stack's limit, at least 1 MiB, for all of them and the arguments."""


class NetworkAccess(StrEnum):
    TRUSTED = "trusted"
    FULL = "full"
    CUSTOM = "custom"


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_variables(variables: dict[str, str]) -> dict[str, str]:
    size = 0
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise PydanticCustomError(
                "variable",
                "Invalid environment variable key: '{name}'. Must match [A-Za-z_][A-Za-z0-9_]*",
                {"name": name},
            )
        length = len(value.encode())
        if length > MAX_VALUE_BYTES:
            raise PydanticCustomError(
                "variable",
                "The value of '{name}' has more than {limit} bytes.",
                {"name": name, "limit": MAX_VALUE_BYTES},
            )
        size += len(name) + length
    if size > MAX_VARIABLES_BYTES:
        raise PydanticCustomError(
            "variable",
            "The environment variables have more than {limit} bytes together.",
            {"limit": MAX_VARIABLES_BYTES},
        )
    return variables


Name = Annotated[Filled, StringConstraints(max_length=255)]
Verbatim = Annotated[str, StringConstraints(strip_whitespace=False)]
"""Values are data, a key file perhaps: nothing is trimmed. Names are shown as they were sent."""
Value = Annotated[Verbatim, BeforeValidator(_number_as_text)]

SetupScript = Annotated[Verbatim, StringConstraints(max_length=64_000, pattern=r"^[^\x00]*$")]


Image = Annotated[Filled, StringConstraints(max_length=255, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")]
"""As container engines take it: `registry/name:tag`, `name@sha256:…`."""


class EnvironmentUpdate(Body):
    """What is not sent stays as it is. `environment_variables` replaces the whole map."""

    name: Annotated[Name | None, NotNull] = None
    network_access_level: NetworkAccess = NetworkAccess.FULL
    allowed_domains: list[Filled] = Field(default_factory=list)
    include_default_domains: bool = False
    repositories: list[Filled] = Field(default_factory=list)
    environment_variables: Annotated[dict[Verbatim, Value], AfterValidator(_check_variables)] = Field(
        default_factory=dict
    )
    private: bool = True
    # Additions of ours.
    setup_script: SetupScript = Field(
        default="",
        description="Run in the sandbox before the agent starts, in the repository: by bash or sh, or by what its "
        "first line names.",
    )
    mcp_servers: McpServers = Field(
        default_factory=list,
        description="MCP servers for the agent; `${NAME}` stands for a variable of the environment.",
    )
    worker_pool: Pool | None = Field(
        default=None,
        description="Only workers of this pool drive runs in the environment; null: those of `default`.",
    )
    image: Image | None = Field(
        default=None,
        description="The container image that sandboxes are made of, on workers that use containers; null: the site's.",
    )


class EnvironmentCreate(EnvironmentUpdate):
    name: Name
