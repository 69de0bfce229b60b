"""What a session offers to choose from, and which of it to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from taskyard.agents.acp import Session

Json = dict[str, Any]


@dataclass(frozen=True)
class Option:
    """A config option of a session that is a choice: its id, the values offered, the current one."""

    id: str
    values: tuple[str, ...]
    current: str | None


def choose_mode(session: Session, *wanted: str | None) -> str | None:
    """The first of the wanted mode ids that the session lists, else None: then no mode is to be set."""
    return next((mode for mode in wanted if mode is not None and mode in session.modes), None)


def option_for(session: Session, category: str) -> Option | None:
    """The session's config option of a category (`model`, `thought_level`, `mode`), None if it has none.

    The id counts as category for an agent that states none.
    """
    for option in session.config_options:
        if option.get("category", option.get("id")) != category or not isinstance(option.get("id"), str):
            continue
        current = option.get("currentValue")
        values = tuple(_values(option.get("options")))
        return Option(option["id"], values, current if isinstance(current, str) else None)
    return None


def auto_answer(options: Sequence[Json], wanted_kinds: Iterable[str]) -> str | None:
    """The id of the permission option to choose: the first of the first wanted kind that is offered.

    None when no kind matches. `allow_once`, `allow_always`, `reject_once`, `reject_always` are ACP's kinds;
    this rule fits all agents tried (several offer two options of one kind: the first is the plain one).
    """
    for kind in wanted_kinds:
        for option in options:
            if option.get("kind") == kind and isinstance(option.get("optionId"), str):
                return str(option["optionId"])
    return None


def _values(options: Any) -> Iterable[str]:
    """The values of a choice; ACP allows them in groups."""
    for option in options if isinstance(options, list) else ():
        if not isinstance(option, dict):
            continue
        if isinstance(option.get("value"), str):
            yield option["value"]
        else:
            yield from _values(option.get("options"))
