"""How traffic becomes entries: what is streamed, what is kept, what is joined."""

from __future__ import annotations

import json
from typing import Any, LiteralString
from uuid import UUID

import pytest

from taskyard.db.engine import Database, Row
from taskyard.drive import transcript as transcripts
from taskyard.drive.transcript import Transcript, left_unjoined
from taskyard.events import entries, store
from taskyard.events.entries import Entry, Shown
from taskyard.redact import Redactor
from tests.support.rows import make_run


class Sink:
    """Takes what a recorder would write."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, *entries: Entry) -> None:
        self.entries.extend(entries)

    def seen(self, shown: Shown) -> list[Any]:
        found = []
        for entry in self.entries:
            if entry.shown & shown:
                message = json.loads(entry.data)["notification"]
                update = message.get("params", {}).get("update")
                found.append(
                    (update["sessionUpdate"], update.get("content", {}).get("text")) if update else message
                )
        return found


def chunk(text: str, message_id: str | None = None, kind: str = "agent_message_chunk") -> dict[str, Any]:
    update: dict[str, Any] = {"sessionUpdate": kind, "content": {"type": "text", "text": text}}
    if message_id:
        update["messageId"] = message_id
    return {"sessionId": "s", "update": update}


def made(*secrets: str) -> tuple[Sink, Transcript]:
    sink = Sink()
    return sink, Transcript(sink, Redactor(secrets))


def test_chunks_are_streamed_and_joined_for_the_log() -> None:
    sink, transcript = made()
    for text in ("Hel", "lo", "!"):
        transcript.update(chunk(text))
    transcript.end_text()
    assert sink.seen(Shown.LOG) == [("agent_message", "Hello!")]
    assert sink.seen(Shown.STREAM) == [("agent_message_chunk", text) for text in ("Hel", "lo", "!")]
    assert transcript.last_message == "Hello!"


def test_another_message_or_kind_begins_a_new_text() -> None:
    sink, transcript = made()
    transcript.update(chunk("a", "1"))
    transcript.update(chunk("b", "2"))
    transcript.update(chunk("hm", None, "agent_thought_chunk"))
    transcript.update(chunk("c", "3"))
    transcript.end_text()
    assert sink.seen(Shown.LOG) == [
        ("agent_message", "a"), ("agent_message", "b"), ("agent_thought_chunk", "hm"), ("agent_message", "c"),
    ]  # fmt: skip


def test_usage_reports_do_not_cut_a_message() -> None:
    sink, transcript = made()
    transcript.update(chunk("a"))
    transcript.update({"sessionId": "s", "update": {"sessionUpdate": "usage_update", "used": 1}})
    transcript.update(chunk("b"))
    transcript.end_text()
    assert ("agent_message", "ab") in sink.seen(Shown.LOG)


def test_a_tool_call_stands_behind_the_text_before_it() -> None:
    sink, transcript = made()
    transcript.update(chunk("look"))
    transcript.update({"sessionId": "s", "update": {"sessionUpdate": "tool_call", "toolCallId": "1"}})
    assert [kind for kind, _ in sink.seen(Shown.LOG)] == ["agent_message", "tool_call"]


def test_images_and_unknown_kinds_pass_through() -> None:
    sink, transcript = made()
    image = {"sessionUpdate": "agent_message_chunk", "content": {"type": "image", "data": "x"}}
    for update in (image, {"sessionUpdate": "never_seen", "content": [1]}):
        transcript.update({"sessionId": "s", "update": update})
    assert [json.loads(entry.data)["notification"]["params"]["update"] for entry in sink.entries] == [
        image, {"sessionUpdate": "never_seen", "content": [1]},
    ]  # fmt: skip
    assert all(entry.shown == Shown.BOTH for entry in sink.entries)
    transcript.update({"update": "nonsense"})
    assert len(sink.entries) == 2


def test_requests_and_answers_are_kept_but_updates_only_once() -> None:
    sink, transcript = made()
    transcript.traffic("out", {"id": 1, "method": "session/prompt", "params": {"prompt": []}})
    transcript.traffic("in", {"jsonrpc": "2.0", "method": "session/update", "params": chunk("replayed")})
    transcript.update(chunk("a"))
    transcript.traffic("in", {"jsonrpc": "2.0", "id": 1, "result": {"stopReason": "end_turn"}})
    methods = [json.loads(entry.data)["notification"].get("method") for entry in sink.entries]
    assert methods == ["session/prompt", "session/update", "session/update", None]


def test_a_message_without_end_is_kept_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcripts, "MAX_JOINED", 10)
    sink, transcript = made()
    for text in ("123456", "789012", "3"):
        transcript.update(chunk(text, "1"))
    assert sink.seen(Shown.LOG) == [("agent_message", "123456789012")]
    transcript.end_text()
    assert sink.seen(Shown.LOG)[1:] == [("agent_message", "3")]


def streamed(*chunks: str) -> list[str]:
    """What is streamed of these chunks, with `s3cret-value` as the secret; the last is the end of the message."""
    sink, transcript = made("s3cret-value")
    for text in chunks:
        transcript.update(chunk(text, "1"))
    seen = [text for _, text in sink.seen(Shown.STREAM)]
    transcript.end_text()
    whole = [text for _, text in sink.seen(Shown.STREAM)]
    assert all("cret-value" not in entry.data for entry in sink.entries)
    assert sink.seen(Shown.LOG) == [("agent_message", "".join(chunks).replace("s3cret-value", "***"))]
    return [*seen, "".join(whole[len(seen) :])]


def test_a_secret_across_chunks_is_not_streamed() -> None:
    assert streamed("It is s3cret", "-val", "ue, yes") == ["It is ", "***, yes", ""]
    assert streamed("s3cret", "-val", "id") == ["s3cret-valid", ""]
    # A short beginning is shown, for nobody should wait for the rest of a word; the rest of a secret is not.
    assert streamed("It is s3", "cret-value.") == ["It is s3", "***.", ""]
    assert streamed("It is s3", "cr", "et-val", "ue") == ["It is s3", "cr", "***", ""]
    assert streamed("s", "3", "s", "3cond") == ["s", "3", "s", "3cond", ""]
    assert streamed("the end s3cret-") == ["the end ", "s3cret-"]


@pytest.mark.parametrize("size", range(1, 14))
def test_a_secret_in_pieces_of_any_size(size: int) -> None:
    said = "s3cret-value and s3cret-value, not s3cret-valid"
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    shown = "".join(streamed(*pieces))
    assert shown.count("***") == 2
    assert shown.endswith(", not s3cret-valid")


class TestLeftUnjoined:
    """The text of a turn whose driver was killed."""

    @pytest.fixture
    async def run_id(self, database: Database) -> UUID:
        return await make_run(database)

    async def write(self, database: Database, run_id: UUID, *written: Entry) -> None:
        async with database.connection() as connection:
            await store.append(connection, run_id, written)

    async def left(self, database: Database, run_id: UUID) -> list[tuple[str, str]]:
        found = await left_unjoined(database, run_id)
        assert all(entry.shown == Shown.LOG for entry in found)
        updates = [json.loads(entry.data)["notification"]["params"]["update"] for entry in found]
        return [(update["sessionUpdate"], update["content"]["text"]) for update in updates]

    async def test_is_what_was_streamed_behind_the_last_joined_message(
        self, database: Database, run_id: UUID
    ) -> None:
        sink, transcript = made()
        transcript.traffic("out", {"method": "session/prompt", "params": {"sessionId": "s"}})
        for text in ("Whole", "."):
            transcript.update(chunk(text, "1"))
        transcript.update(chunk("So", "2", kind="agent_thought_chunk"))
        state = entries.raw({"type": "task_run_state", "status": "in_progress"}, Shown.STREAM)
        await self.write(database, run_id, *sink.entries, state)
        sink.entries.clear()
        transcript.update({"sessionId": "s", "update": {"sessionUpdate": "usage_update", "used": 1}})
        transcript.update(chunk(", half", "2", kind="agent_thought_chunk"))
        await self.write(database, run_id, *sink.entries)
        assert await self.left(database, run_id) == [("agent_thought_chunk", "So, half")]
        await self.write(database, run_id, *await left_unjoined(database, run_id))
        assert await self.left(database, run_id) == []

    async def test_of_any_length(
        self, database: Database, run_id: UUID, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transcripts, "PAGE", 2)
        sink, transcript = made()
        transcript.traffic("out", {"method": "session/prompt", "params": {"sessionId": "s"}})
        for text in "abcde":
            transcript.update(chunk(text))
        await self.write(database, run_id, *sink.entries)
        assert await self.left(database, run_id) == [("agent_message", "abcde")]

    async def test_is_not_hidden_by_what_clients_append(self, database: Database, run_id: UUID) -> None:
        sink, transcript = made()
        transcript.traffic("out", {"method": "session/prompt", "params": {"sessionId": "s"}})
        transcript.update(chunk("Half"))
        said = {"sessionUpdate": "agent_message", "content": {"type": "text", "text": '"sessionId": "s"'}}
        theirs = entries.session_update("other", said, Shown.LOG)
        await self.write(database, run_id, *sink.entries, theirs)
        assert await self.left(database, run_id) == [("agent_message", "Half")]

    async def test_looks_once_for_the_last_joined_message(
        self, database: Database, run_id: UUID, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transcripts, "PAGE", 2)
        statements: list[str] = []
        fetch = database.fetch

        async def counted(query: LiteralString, **params: Any) -> list[Row]:
            statements.append(query)
            return await fetch(query, **params)

        sink, transcript = made()
        transcript.traffic("out", {"method": "session/prompt", "params": {"sessionId": "s"}})
        for text in "abcde":
            transcript.update(chunk(text))
        await self.write(database, run_id, *sink.entries)
        monkeypatch.setattr(database, "fetch", counted)
        assert await self.left(database, run_id) == [("agent_message", "abcde")]
        assert len(statements) == 4
        assert not any("max(" in statement for statement in statements)

    async def test_is_not_what_others_streamed(self, database: Database, run_id: UUID) -> None:
        """Clients upload events of an agent of theirs, of any shape, also before the server's own has the run."""
        theirs = [
            entries.named("session/update", chunk("before"), Shown.STREAM),
            entries.raw({"notification": {"method": "x", "params": {"sessionId": "s"}}}, Shown.STREAM),
            entries.raw({"type": "notification", "notification": "odd"}, Shown.STREAM),
            entries.named("session/update", {**chunk("other"), "sessionId": "t"}, Shown.STREAM),
        ]  # fmt: skip
        await self.write(database, run_id, *theirs)
        assert await self.left(database, run_id) == []
        sink, transcript = made()
        transcript.traffic("out", {"method": "session/prompt", "params": {"sessionId": "s"}})
        transcript.update(chunk("ours"))
        await self.write(database, run_id, *sink.entries, *theirs[1:])
        assert await self.left(database, run_id) == [("agent_message", "ours")]
