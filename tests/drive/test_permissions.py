"""Which request an answer of a person belongs to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from taskyard.drive.permissions import Permissions
from taskyard.events.entries import Entry

OPTIONS = [{"optionId": "yes", "kind": "allow_once"}, {"optionId": "no", "kind": "reject_once"}]


class Sink:
    """Takes what a recorder would write."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, *entries: Entry) -> None:
        self.entries.extend(json.loads(entry.data) for entry in entries)


async def test_an_answer_reaches_its_own_request_only() -> None:
    sink = Sink()
    permissions = Permissions(sink, mode="default", attended=True)  # type: ignore[arg-type]
    method = "session/request_permission"
    # Some agents do not say which tool call they ask for.
    asked = [
        asyncio.create_task(permissions.answer(method, {"options": OPTIONS, "toolCall": tool_call}))
        for tool_call in ({}, {"toolCallId": "t"})
    ]
    await asyncio.wait(asked, timeout=0.1)
    assert permissions.waiting
    first = next(entry["requestId"] for entry in sink.entries if entry["type"] == "permission_request")
    for stranger in ({"requestId": "another"}, {"toolCallId": "another"}):
        with pytest.raises(LookupError, match="no such permission request"):
            permissions.resolve({**stranger, "optionId": "yes"})
    permissions.resolve({"toolCallId": "t", "optionId": "no"})
    permissions.resolve({"requestId": first, "optionId": "yes"})
    answers = [(await task)["outcome"]["optionId"] for task in asked]
    assert answers == ["yes", "no"]
    assert not permissions.waiting
