"""Which domains a network access level stands for (run-lifecycle §5.3)."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources

from taskyard.db.engine import Row
from taskyard.gateway.hosts import HostRules
from taskyard.gateway.policy import Network
from taskyard.settings import Settings


@cache
def built_in() -> tuple[str, ...]:
    """The list in `trusted_domains.toml`, without its categories."""
    text = resources.files(__package__).joinpath("trusted_domains.toml").read_text("utf-8")
    categories: dict[str, list[str]] = tomllib.loads(text)
    return tuple(dict.fromkeys(name for names in categories.values() for name in names))


def trusted(settings: Settings) -> Sequence[str]:
    """The domains of the level `trusted` on this site."""
    return built_in() if settings.trusted_domains is None else settings.trusted_domains


def effective(
    level: str, allowed: Sequence[str], include_default: bool, defaults: Sequence[str]
) -> list[str]:
    """The domains that a level allows; empty for `full`, which allows all (tasks-api §9)."""
    if level == "full":
        return []
    if level == "trusted":
        return list(defaults)
    return list(dict.fromkeys([*allowed, *(defaults if include_default else ())]))


def network(settings: Settings, environment: Row | None) -> Network:
    """What a run with this environment, or without one, may reach.

    An empty list of a custom environment allows nothing: the run then has its model APIs and its repository only.
    """
    level: str = settings.network.default if environment is None else environment["network_access_level"]
    internal = HostRules(settings.network.internal_hosts, None)
    limit = settings.network.max_bytes
    if level in ("full", "none"):
        return Network("full" if level == "full" else "none", internal=internal, max_bytes=limit)
    allowed, include = (
        ([], False)
        if environment is None
        else (environment["allowed_domains"], environment["include_default_domains"])
    )
    names = effective(level, allowed, include, trusted(settings))
    return Network("listed", HostRules(names), internal, limit)
