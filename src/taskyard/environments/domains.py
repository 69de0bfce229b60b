"""Which domains a network access level stands for (run-lifecycle §5.3)."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources

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
