"""The conversation of a run, and of those it resumes, as a text: for an agent that cannot open its session again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any
from uuid import UUID

from taskyard.events.entries import Shown
from taskyard.events.record import Record

MAX_CHARS = 48_000
"""What is kept of a conversation: its end."""
MAX_ONE = 8_000
"""What is kept of one message: its beginning."""

SPEAKERS = {
    "user_message": "User",
    "user_message_chunk": "User",
    "agent_message": "You",
    "tool_call": "You used a tool",
}


async def conversation(record: Record, run_ids: Sequence[UUID]) -> str:
    """What user and agent said in these runs, oldest first; "" when nothing was said."""
    said: list[str] = []
    size = 0
    for run_id in run_ids:
        async with aclosing(record.pages(run_id, Shown.LOG)) as pages:
            async for page in pages:
                for text in filter(None, map(_line, page)):
                    said.append(text)
                    size += len(text)
                while size > MAX_CHARS and len(said) > 1:
                    size -= len(said.pop(0))
    return "\n".join(said)[-MAX_CHARS:]


def _line(data: str) -> str:
    if '"session/update"' not in data:  # most entries are not worth parsing
        return ""
    try:
        update: Any = json.loads(data)["notification"]["params"]["update"]
        speaker = SPEAKERS.get(update["sessionUpdate"])
    except (ValueError, KeyError, TypeError):
        return ""
    if speaker is None:
        return ""
    content = update.get("content")
    text = update.get("title") if speaker == "You used a tool" else None
    if isinstance(content, dict):
        text = content.get("text") or content.get("uri")
    if not isinstance(text, str) or not text.strip():
        return ""
    return f"{speaker}: {text.strip()[:MAX_ONE]}"
