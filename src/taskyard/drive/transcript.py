"""Turns the traffic with an agent into entries of the record.

Streamed text is shown live chunk by chunk, and kept in the log as one joined message (run-lifecycle
§7.5). Everything else is kept and shown as it came.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Protocol
from uuid import UUID

from taskyard.db.engine import Database
from taskyard.events import entries, store
from taskyard.events.entries import Entry, Shown
from taskyard.redact import Redactor

Json = dict[str, Any]

JOINED = {"agent_message_chunk": "agent_message", "agent_thought_chunk": "agent_thought_chunk"}
"""Kinds of streamed text, and the kind of the joined entry."""
MAX_JOINED = 4 * 1024 * 1024
"""Characters of one joined entry; an agent that never ends its message must not fill the memory."""


class Record(Protocol):
    def add(self, *entries: Entry) -> None: ...


class Transcript:
    """Feed it everything that is said to and by the agent, in order."""

    def __init__(self, recorder: Record, secrets: Redactor | None = None) -> None:
        self._recorder = recorder
        self._secrets = secrets or Redactor()
        self._held = ""
        """The end of what was said: it may be the beginning of a secret, so it is shown with the next piece."""
        self._begun = ""
        """The same, but so short that it was shown; the rest of the secret will not be."""
        self._kind = ""
        self._message_id: str | None = None
        self._session_id = ""
        self._parts: list[str] = []
        self._size = 0
        self.last_message = ""
        """The text of the newest whole message of the agent."""

    def begin_turn(self) -> None:
        self.last_message = ""

    def traffic(self, direction: Literal["in", "out"], message: Json) -> None:
        """One JSON-RPC message as it went over the wire; updates come through `update`, without replays."""
        if direction == "in" and message.get("method") == "session/update":
            return
        self.end_text()
        self._recorder.add(entries.notification({"jsonrpc": "2.0", **message}))

    def update(self, params: Json) -> None:
        """The parameters of one `session/update`."""
        update = params.get("update")
        if not isinstance(update, dict):
            return
        kind = update.get("sessionUpdate")
        text = _text(update) if kind in JOINED else None
        session_id = str(params.get("sessionId", ""))
        if text is None:
            # Usage reports come between the chunks of one message and do not end it.
            if kind != "usage_update":
                self.end_text()
            self._recorder.add(entries.named("session/update", params))
            return
        message_id = update.get("messageId")
        if (kind, message_id) != (self._kind, self._message_id):
            self.end_text()
            self._kind, self._message_id, self._session_id = str(kind), message_id, session_id
        self._parts.append(text)
        self._size += len(text)
        self._show(params, text)
        if self._size > MAX_JOINED:
            self.end_text()

    def end_text(self) -> None:
        """Write the joined text that was streamed so far to the log."""
        if not self._parts:
            return
        if self._held:
            held = self._held
            chunk = {"sessionUpdate": self._kind, "content": {"type": "text", "text": held}}
            if self._message_id is not None:
                chunk["messageId"] = self._message_id
            params = {"sessionId": self._session_id, "update": chunk}
            self._recorder.add(entries.named("session/update", params, Shown.STREAM))
        text = self._secrets.text("".join(self._parts))
        update = {"sessionUpdate": JOINED[self._kind], "content": {"type": "text", "text": text}}
        if self._kind == "agent_message_chunk":
            self.last_message = text
        self._recorder.add(entries.session_update(self._session_id, update, Shown.LOG))
        self._kind, self._message_id, self._parts, self._size = "", None, [], 0
        self._held = self._begun = ""

    def _show(self, params: Json, text: str) -> None:
        """Show one chunk live. Secrets may lie across chunks, so it is another one than the agent's at times."""
        clean = self._secrets.text(self._begun + self._held + text)
        size, much = self._secrets.unfinished(clean)
        # Else a secret began in what was shown, and is a mask by now.
        new = clean.removeprefix(self._begun)
        end = len(new) - (min(size, len(new)) if much else 0)
        shown, self._held = new[:end], new[end:]
        self._begun = clean[len(clean) - size : len(clean) - len(self._held)]
        if shown != text:
            if not shown:
                return
            update = params["update"]
            params = {**params, "update": {**update, "content": {**update["content"], "text": shown}}}
        self._recorder.add(entries.named("session/update", params, Shown.STREAM))


def _text(update: Json) -> str | None:
    """The text of a chunk; None when it carries something else, such as an image."""
    content = update.get("content")
    if isinstance(content, dict) and content.get("type") == "text" and isinstance(content.get("text"), str):
        return str(content["text"])
    return None


class _ForTheLog:
    """A record that keeps what only the log shows."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, *entries: Entry) -> None:
        self.entries += [entry for entry in entries if entry.shown == Shown.LOG]


PAGE = 1000


async def left_unjoined(database: Database, run_id: UUID) -> list[Entry]:
    """What the log lacks of a turn whose driver was killed: the text that was streamed and not joined yet."""
    prompt = await store.last_prompt(database, run_id)
    if prompt is None:
        return []
    session_id = json.loads(prompt.data)["notification"]["params"]["sessionId"]
    found = _ForTheLog()
    transcript = Transcript(found)
    kinds = [*JOINED.values()]
    after = await store.last_joined(database, run_id, kinds, session_id, after=prompt.seq)
    while page := await store.streamed_since(database, run_id, after=after, limit=PAGE):
        for item in page:
            try:
                params = json.loads(item.data)["notification"]["params"]
                if params["sessionId"] == session_id and params["update"]["sessionUpdate"] in JOINED:
                    transcript.update(params)
            except (KeyError, TypeError):  # something else
                continue
        after = page[-1].seq
    transcript.end_text()
    return found.entries
