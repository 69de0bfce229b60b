"""What one run may do at the door, and the record of what it may not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from taskyard.gateway.models import ModelRoute

MAX_TARGET = 500


@dataclass(frozen=True)
class Policy:
    """The rules for one run."""

    run_id: str
    models: Mapping[str, ModelRoute]
    """By API: "anthropic", "openai"."""


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
