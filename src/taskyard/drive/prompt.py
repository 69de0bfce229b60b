"""What the agent is told first (run-lifecycle §6.4), and how text becomes a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Message:
    """What the agent is told: a text, and artifacts of the run that belong to it."""

    text: str
    artifacts: Sequence[Mapping[str, Any]] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.artifacts)


BLOCKS = "__twig_cloud_prompt_v1__:"
"""A prompt that starts so carries ACP content blocks as JSON; they pass through untouched."""


def first_prompt(state: Mapping[str, Any], description: str, *, begun: bool = False) -> str:
    """The pending message, else the override, else the task's description; "" = wait for a message.

    Work that was begun elsewhere goes on with a message: it is not begun again.
    """
    start = () if begun else (state.get("initial_prompt_override"), description)
    for text in (state.get("pending_user_message"), *start):
        if isinstance(text, str) and text.strip():
            return text
    return ""


def pending_artifacts(
    state: Mapping[str, Any], manifest: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The entries of the run's artifacts that come with its first message."""
    ids = state.get("pending_user_artifact_ids")
    known = {entry.get("id"): entry for entry in manifest}
    return (
        [known[one] for one in ids if isinstance(one, str) and one in known] if isinstance(ids, list) else []
    )


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def content_blocks(text: str) -> list[dict[str, Any]]:
    """ACP content blocks of a prompt text."""
    if text.startswith(BLOCKS):
        try:
            blocks = json.loads(text.removeprefix(BLOCKS))["blocks"]
        except (ValueError, KeyError, TypeError):
            blocks = None
        if isinstance(blocks, list) and blocks and all(isinstance(block, dict) for block in blocks):
            return blocks
    return [text_block(text)]


INTERRUPTED = (
    "The work on the last message was interrupted, because the machine it ran on was lost or restarted. Go on with it"
    " now: look at what is done already, and do the rest. Programs that were running then have ended."
)
HISTORY = "This is what was said before in this task, by the user and by you; the newest is at the end:"


def continuation(text: str) -> list[dict[str, Any]]:
    """What an agent is told whose turn was interrupted. It gets the message again: it may not have read it."""
    if text.startswith(BLOCKS):  # with pictures, perhaps
        return [text_block(f"{INTERRUPTED} The message follows."), *content_blocks(text)]
    return [text_block(f"{INTERRUPTED} The message was:\n\n{quoted(text)}")]


def with_history(history: str, blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A prompt for an agent that does not know the conversation so far."""
    return [text_block(f"{HISTORY}\n\n{quoted(history)}\n\nWhat follows is new."), *blocks]


def quoted(text: str) -> str:
    """Indented, so that it cannot be taken for what is said now."""
    return "\n".join(f"    {line}" for line in text.splitlines())
