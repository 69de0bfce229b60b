"""How traffic becomes entries: what is streamed, what is kept, what is joined."""

from __future__ import annotations

import json
from typing import Any

import pytest

from taskyard.drive import transcript as transcripts
from taskyard.drive.transcript import Transcript
from taskyard.events.entries import Entry, Shown
from taskyard.redact import Redactor


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
    return sink, Transcript(sink, Redactor(secrets))  # type: ignore[arg-type] # a sink is all of a recorder it needs


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
