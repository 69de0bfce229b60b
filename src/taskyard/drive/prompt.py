"""What the agent is told first (run-lifecycle §6.4), and how text becomes a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BLOCKS = "__twig_cloud_prompt_v1__:"
"""A prompt that starts so carries ACP content blocks as JSON; they pass through untouched."""

PENDING_KEYS = ("pending_user_message", "pending_user_artifact_ids", "pending_user_message_ts")
"""Keys of `state` that the first prompt uses up."""


def first_prompt(state: Mapping[str, Any], description: str) -> str:
    """The pending message, else the override, else the task's description; "" = wait for a message."""
    for text in (state.get("pending_user_message"), state.get("initial_prompt_override"), description):
        if isinstance(text, str) and text.strip():
            return text
    return ""


def content_blocks(text: str) -> list[dict[str, Any]]:
    """ACP content blocks of a prompt text."""
    if text.startswith(BLOCKS):
        try:
            blocks = json.loads(text.removeprefix(BLOCKS))["blocks"]
        except (ValueError, KeyError, TypeError):
            blocks = None
        if isinstance(blocks, list) and blocks and all(isinstance(block, dict) for block in blocks):
            return blocks
    return [{"type": "text", "text": text}]
