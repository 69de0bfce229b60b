"""A run on a terminal: recorded events against the text that they give."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from taskyard.cli.show import Renderer
from taskyard.cli.text import clean
from taskyard.client import Event, Run, models

RECORDED = Path(__file__).parent / "recorded"
RUN: dict[str, Any] = {
    "id": "r",
    "task": "t",
    "status": "completed",
    "branch": "taskyard/def-0",
    "output": {"head_branch": "taskyard/def-0", "commit_sha": "1"},
    "state": {"token_usage": {"input_tokens": 12345, "output_tokens": 678, "cached_read_tokens": 1000}},
    "created_at": "2026-11-25T10:00:00Z",
    "completed_at": "2026-11-25T10:01:12Z",
}


class Screen:
    """A renderer and what it has written."""

    def __init__(self, *, terminal: bool = False, width: int = 80) -> None:
        self.file = io.StringIO()
        self.renderer = Renderer(
            Console(
                file=self.file,
                width=width,
                force_terminal=terminal,
                highlight=False,
                markup=False,
                emoji=False,
            )
        )

    def show(self, *events: dict[str, Any]) -> str:
        for data in events:
            self.renderer.event(Event(data=data, raw=""))
        return self.text

    @property
    def text(self) -> str:
        return self.file.getvalue()


def entry(method: str, **params: Any) -> dict[str, Any]:
    return {"type": "notification", "notification": {"jsonrpc": "2.0", "method": method, "params": params}}


def update(kind: str, **fields: Any) -> dict[str, Any]:
    return entry("session/update", sessionId="s", update={"sessionUpdate": kind, **fields})


def said(text: str, kind: str = "agent_message_chunk", message: str | None = "m") -> dict[str, Any]:
    return update(kind, content={"type": "text", "text": text}, messageId=message)


def tool(tool_id: str = "t", *, kind: str = "tool_call_update", **fields: Any) -> dict[str, Any]:
    return update(kind, toolCallId=tool_id, **fields)


def ended(**fields: Any) -> Run:
    return msgspec.convert(RUN | fields, Run)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("*.jsonl")))
def test_recorded_events(name: str) -> None:
    screen = Screen()
    for line in (RECORDED / f"{name}.jsonl").read_text("utf-8").splitlines():
        event = models.event(line)
        assert event is not None
        screen.renderer.event(event)
    screen.renderer.finish(ended())
    assert screen.text == (RECORDED / f"{name}.txt").read_text("utf-8")
    assert max(map(len, screen.text.splitlines())) <= 80


def test_a_terminal_shows_a_step_that_runs_and_then_its_end_in_its_place() -> None:
    screen = Screen(terminal=True)
    started = screen.show(entry("_posthog/progress", step="clone", status="in_progress", label="Cloning"))
    assert "… Cloning" in started
    assert not started.endswith("\n")
    done = screen.show(entry("_posthog/progress", step="clone", status="completed", label="Cloning"))
    assert done[len(started) :].startswith("\r\x1b[2K")
    assert done.endswith("Cloning\n")


def test_a_step_that_was_overtaken_gets_a_line_of_its_own() -> None:
    screen = Screen(terminal=True)
    screen.show(
        entry("_posthog/progress", step="a", status="in_progress", label="A"),
        entry("_posthog/console", level="warn", message="careful"),
        entry("_posthog/progress", step="a", status="failed", label="A", detail="first\nsecond"),
    )
    lines = [line for line in clean(screen.text).splitlines() if line]
    assert lines == ["… A", "! careful", "✗ A", "  first", "  second"]


def test_without_a_terminal_there_is_nothing_but_text() -> None:
    screen = Screen()
    text = screen.show(
        entry("_posthog/progress", step="a", status="in_progress", label="A"),
        said("x \x1b[2Jy\r", "agent_thought_chunk"),
        entry("_posthog/error", message="\x1b]0;pwned\x07bad"),
    )
    assert text == "· x y\n\n✗ bad\n"


def test_the_joined_message_is_not_shown_again() -> None:
    end = entry("_posthog/turn_complete", stopReason="end_turn")
    chunks = (said("Hello "), said("you."))
    assert Screen().show(*chunks, said("Hello you.", "agent_message", None), end) == "Hello you.\n"
    screen = Screen()
    screen.show(said("first", "agent_message", None), said("second", "agent_message", None))
    screen.renderer.finish(ended(output=None, branch=None, state={}))
    assert screen.text == "first\n\nsecond\n\n✓ completed in 1 min 12 s\n"


def test_a_repeated_question_is_shown_once() -> None:
    question = said("Do it", "user_message_chunk")
    assert Screen().show(question, question) == "› Do it\n"


def test_long_thoughts_and_questions_are_cut() -> None:
    screen = Screen()
    screen.show(
        *[said("word " * 50, "agent_thought_chunk")] * 5, said("\n".join("abcdefghijklmnop"), "user_message")
    )
    thought, _, question = screen.text.partition("\n\n")
    assert thought.count("word") == 120
    assert thought.endswith("…")
    assert question.splitlines()[-1] == "  … 10 more lines"


def test_a_call_is_named_when_it_is_clear_what_it_does() -> None:
    screen = Screen()
    assert screen.show(tool(kind="tool_call", title="Terminal", status="pending", rawInput={})) == ""
    assert screen.show(tool(kind="tool_call_update", title="`ls`")) == "● ls\n"
    assert screen.show(tool(status="completed", rawOutput="a\nb")) == "● ls\n  │ a\n  │ b\n"
    assert screen.show(tool(status="completed", rawOutput="a\nb")) == "● ls\n  │ a\n  │ b\n"


def test_an_outcome_says_whose_it_is_when_another_call_came_between() -> None:
    text = Screen().show(
        tool("a", kind="tool_call", title="A", status="in_progress"),
        tool("b", kind="tool_call", title="B", status="in_progress"),
        tool("a", status="completed", rawOutput="of a"),
        tool("b", status="failed", rawOutput="of b"),
    )
    assert text == "● A\n● B\n● A\n  │ of a\n● B\n  │ of b\n  ✗ failed\n"


def test_a_call_without_news_is_named_at_the_end_of_the_turn() -> None:
    screen = Screen()
    screen.show(tool(kind="tool_call", title="Think", status="pending"))
    assert screen.show(entry("_posthog/turn_complete", stopReason="end_turn")) == "● Think\n"


def test_terminal_output_in_pieces() -> None:
    text = Screen().show(
        tool(kind="tool_call", title="make", status="in_progress", content=[{"type": "terminal"}]),
        tool(_meta={"terminal_output_delta": {"data": "one\n"}}),
        tool(_meta={"terminal_output_delta": {"data": "two\n"}}),
        tool(status="completed"),
    )
    assert text == "● make\n  │ one\n  │ two\n"


def test_a_command_is_shown_as_one() -> None:
    call = {"sessionUpdate": "tool_call", "toolCallId": "t", "kind": "execute", "status": "in_progress"}
    command = {"command": ["bash", "-c", "make -j8 everything"]}
    text = Screen(width=20).show(entry("session/update", update=call | {"rawInput": command}))
    assert text == "● $ bash -c make -j…\n"


def test_a_command_without_the_shell_around_it_and_its_exit_code() -> None:
    call: dict[str, Any] = {
        "sessionUpdate": "tool_call",
        "toolCallId": "t",
        "kind": "execute",
        "status": "in_progress",
    }
    call |= {
        "title": "make all",
        "rawInput": {"command": "/bin/sh -lc 'make all'"},
        "content": [{"type": "terminal"}],
    }
    text = Screen().show(
        entry("session/update", update=call),
        tool(status="failed", _meta={"terminal_exit": {"exit_code": 2, "signal": None}}),
    )
    assert text == "● $ make all\n  ✗ failed (exit code 2)\n"


def test_permission_is_asked_once() -> None:
    request = {
        "requestId": "q",
        "toolCall": {"title": "rm"},
        "options": [{"optionId": "y", "name": "Yes"}, 3],
    }
    text = Screen().show(
        {"type": "permission_request", **request},
        entry("_posthog/permission_request", **request),
        entry("_posthog/permission_resolved", requestId="q", optionId="y"),
    )
    assert text == "? The agent asks for permission: rm\n  y: Yes\n  answered: y\n"


def test_an_error_is_told_once() -> None:
    text = Screen().show(
        entry("_posthog/progress", step="a", status="failed", label="A", detail="It broke."),
        entry("_posthog/error", message="It broke."),
        entry("_posthog/error", message="More."),
        entry("_posthog/turn_complete", stopReason="error"),
        entry("_posthog/error", message="More."),
    )
    assert text == "✗ A\n  It broke.\n\n✗ More.\n"


def test_what_is_not_understood_is_passed_over() -> None:
    assert (
        Screen().show(
            {"type": "info", "message": "x"},
            {"type": "notification"},
            {"type": "notification", "notification": {"method": 3, "params": []}},
            entry("session/update", update="x"),
            update("tool_call", toolCallId="t", content="x", title=3),
            update("plan", entries=[3]),
            update("agent_message_chunk", content=None),
            update("usage_update", used=1),
            entry("_posthog/console", level="info", message="x"),
            entry("__posthog/unheard_of"),
        )
        == ""
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "✓ completed in 1 min 12 s · 12,345 tokens in (1,000 cached), 678 out\n  branch taskyard/def-0\n"),
        ({"completed_at": None, "state": {}, "output": None}, "✓ completed\n"),
        ({"status": "failed", "error_message": "It broke\nbadly", "output": None, "state": {"error_type": "x_y"}},
         "✗ failed after 1 min 12 s\n  It broke\n  badly\n  (x_y)\n"),
        ({"status": "cancelled", "state": {}, "completed_at": "2026-11-25T11:02:00Z"},
         "■ cancelled after 1 h 2 min\n  branch taskyard/def-0\n"),
        ({"state": {}, "completed_at": "2026-11-25T10:00:07.26Z", "output": {"pr_url": "https://x/1", "answer": 42}},
         '✓ completed in 7.3 s\n  branch taskyard/def-0\n  pull request https://x/1\n  {\n    "answer": 42\n  }\n'),
        ({"state": {}, "output": ["a"], "branch": None}, '✓ completed in 1 min 12 s\n  [\n    "a"\n  ]\n'),
    ],
)  # fmt: skip
def test_the_end_of_a_run(fields: dict[str, Any], text: str) -> None:
    screen = Screen()
    screen.renderer.finish(ended(**fields))
    assert screen.text == text


@pytest.mark.parametrize("odd", [True, 3, 1.5, "x", {"a": 1}, None, [1, None, "x"]])
def test_lists_that_are_none_are_passed_over(odd: Any) -> None:
    """Anybody who may append to a log chooses the shapes of its entries."""
    screen = Screen()
    screen.show(
        update("plan", entries=odd),
        entry("_posthog/permission_request", requestId="1", options=odd),
        {"type": "permission_request", "requestId": "2", "options": odd},
        said("Still here."),
    )
    screen.show(entry("_posthog/turn_complete", stopReason="end_turn"))
    assert screen.text.count("The agent asks for permission") == 2
    assert "Still here." in screen.text


def test_a_step_whose_times_are_written_differently() -> None:
    screen = Screen()
    begun = entry("_posthog/progress", step="s", status="in_progress", label="Clone")
    done = entry("_posthog/progress", step="s", status="completed", label="Clone")
    screen.show(begun | {"timestamp": "2026-01-01T00:00:00"}, done | {"timestamp": "2026-01-01T00:00:05Z"})
    assert "Clone  5.0 s" in screen.text
