"""The conversation as a text. Its lines come from a stand-in for the record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import UUID, uuid4

from taskyard.drive.history import MAX_CHARS, MAX_ONE, conversation
from taskyard.events import entries
from taskyard.events.entries import Shown

FIRST, SECOND = uuid4(), uuid4()


class Record:
    """Gives the log of each run in pages of two."""

    def __init__(self, logs: Mapping[UUID, list[str]]) -> None:
        self._logs = logs

    async def pages(self, run_id: UUID, shown: Shown) -> AsyncIterator[list[str]]:
        assert shown is Shown.LOG
        lines = self._logs[run_id]
        for at in range(0, len(lines), 2):
            yield lines[at : at + 2]


def update(kind: str, **fields: Any) -> str:
    return entries.session_update("s", {"sessionUpdate": kind, **fields}).data


def text(kind: str, words: str) -> str:
    return update(kind, content={"type": "text", "text": words})


async def told(*logs: list[str]) -> str:
    runs = dict(zip((FIRST, SECOND), logs, strict=False))
    return await conversation(Record(runs), list(runs))  # type: ignore[arg-type]


async def test_who_said_what_in_order() -> None:
    first = [
        text("user_message_chunk", "Fix it\n"),
        text("agent_thought", "hm"),
        update("tool_call", title="Edit a.txt", content=[{"type": "diff"}]),
        entries.console("r", "info", "session/update").data,
        text("agent_message", "Done"),
    ]
    second = [text("user_message", "More"), text("agent_message", "  ")]
    assert await told(first, second) == ("User: Fix it\nYou used a tool: Edit a.txt\nYou: Done\nUser: More")


async def test_attachments_are_named() -> None:
    link = update("user_message_chunk", content={"type": "resource_link", "uri": "file:///in/a.png"})
    assert await told([link]) == "User: file:///in/a.png"


async def test_nothing_was_said() -> None:
    assert await told([], [entries.console("r", "info", "x").data]) == ""
    assert await told(["{", '{"session/update": 1}', '"session/update"']) == ""


async def test_long_messages_lose_their_ends_and_long_talks_their_beginning() -> None:
    one = await told([text("agent_message", "x" * (MAX_ONE + 5))])
    assert len(one) == MAX_ONE + len("You: ")
    words = [text("agent_message", f"{number} " + "y" * 5_000) for number in range(30)]
    talk = await told(words, [text("user_message", "the end")])
    assert len(talk) <= MAX_CHARS
    assert talk.endswith("User: the end")
    assert "\nYou: 29 " in talk
    assert "You: 0 " not in talk
