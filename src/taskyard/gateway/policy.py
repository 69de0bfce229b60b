"""What one run may do at the door, and the record of what it may not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from taskyard.gateway.budget import Budget
from taskyard.gateway.hosts import HostRules
from taskyard.gateway.models import ModelRoute
from taskyard.gateway.prices import BUILT_IN, Prices

MAX_TARGET = 500


@dataclass(frozen=True)
class Network:
    """Which hosts a run may reach (run-lifecycle §5.3)."""

    level: Literal["none", "listed", "full"] = "none"
    """`listed`: what `rules` allow. `full`: every public address, on every port."""
    rules: HostRules = field(default_factory=lambda: HostRules(()))
    internal: HostRules = field(default_factory=lambda: HostRules((), None))
    """Hosts that the operator lets sandboxes reach although they are not on the public internet. The level has to
    allow them as well."""
    max_bytes: int | None = None
    """Of traffic in both directions, model and git traffic not counted; then nothing more passes."""


@dataclass(frozen=True)
class GitRepository:
    """A repository that a run may use, at `/git/<name>.git` of the gateway."""

    name: str
    """`org/repo`, in lower case."""
    url: str
    """Where it is: an http(s) URL without user information."""
    branches: Sequence[str] = ()
    """The branches that may be pushed, nothing else; without `refs/heads/`."""
    credentials: Callable[[], Awaitable[str | None]] | None = field(default=None, repr=False)
    """Gives the token, asked for each request. It goes to `url` only."""
    on_push: Callable[[str], Awaitable[bool]] | None = field(default=None, repr=False)
    """Told the commit of each push before it is passed on; False when it must not be."""


@dataclass(frozen=True)
class ToolAnswer:
    """What a tool says to the agent that called it."""

    text: str
    failed: bool = False
    """The call did nothing; the text says why, so that the agent can call again."""


@dataclass(frozen=True)
class Tool:
    """A tool of the server's for a run's agent, offered by MCP at `mcp.PATH` of the gateway."""

    name: str
    description: str
    input_schema: Mapping[str, Any]
    """A JSON Schema of type `object`, for the agent to read: the arguments of a call can be any object."""
    call: Callable[[dict[str, Any]], Awaitable[ToolAnswer]]


@dataclass
class ReadAhead:
    """Bytes of a run's requests that are held in the worker's memory until they have been sent."""

    bytes: int = 0


@dataclass(frozen=True)
class Policy:
    """The rules for one run."""

    run_id: str
    models: Mapping[str, ModelRoute]
    """By API: "anthropic", "openai"."""
    network: Network = Network()
    git: Sequence[GitRepository] = ()
    allowed_models: Sequence[Sequence[str]] = ()
    """Lists of names of models, `*` for any characters; a model has to be in each of them."""
    budget: Budget = field(default_factory=Budget)
    prices: Prices = BUILT_IN
    read_ahead: ReadAhead = field(default_factory=ReadAhead)
    tools: Sequence[Tool] = ()


@dataclass(frozen=True)
class Refusal:
    """A request that was turned away. Safe to show: no query, no user and password."""

    method: str
    """Empty when the request could not be read."""
    target: str
    """Path, `host:port` (CONNECT) or URL, at most 500 characters."""
    reason: str
    status: int
    """HTTP status that the agent got."""
    rule: str | None = None
    """What in `allowed_domains` of the run's environment would let it pass, if anything there would."""


def shown_target(target: str) -> str:
    """A request target without its query and without user and password.

    >>> shown_target("http://me:secret@example.org/a?token=1")
    'http://example.org/a'
    """
    target = target.partition("?")[0].partition("#")[0]
    if not target.startswith("/"):
        scheme, mark, rest = target.rpartition("://")
        authority, slash, path = rest.partition("/")
        target = scheme + mark + authority.rpartition("@")[2] + slash + path
    return target[:MAX_TARGET]
