"""Shows a run on a terminal, event by event."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from taskyard.cli.outcome import duration, outcome
from taskyard.cli.show_tools import DONE, ToolCall
from taskyard.cli.text import Prose, clean, crop
from taskyard.client.models import Event, Run

Json = dict[str, Any]

THOUGHT_CHARS = 600
MESSAGE_LINES = 6
PLAN_MARKS = {"completed": ("☑", "green"), "in_progress": ("◐", "cyan")}
STOP_NOTES = {
    "cancelled": "The turn was cancelled.",
    "refusal": "The agent refused to go on.",
    "max_tokens": "The model reached its limit of tokens.",
    "max_turn_requests": "The agent reached its limit of model requests in one turn.",
}


def terminal() -> Console:
    """Standard output. Colours only on a terminal, and not with NO_COLOR."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


class Renderer:
    """Give it the events of a stream or a log in order, then the run as it ended.

    Blocks of a different kind are set apart by an empty line.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._block = ""
        self._prose: Prose | None = None
        self._message: tuple[str, Any] = ("", None)
        self._said = ""
        self._asked = ""
        self._step = ""
        self._step_times: dict[str, str] = {}
        self._plan: dict[str, str] = {}
        self._tools: dict[str, ToolCall] = {}
        self._tool = ""
        self._permissions: set[str] = set()
        self._told: set[str] = set()
        self._methods: dict[str, Callable[[Event], None]] = {
            "session/update": self._update,
            "_posthog/progress": self._progress,
            "_posthog/console": self._console_line,
            "_posthog/sandbox_output": self._sandbox_output,
            "_posthog/error": self._error,
            "_posthog/status": self._status,
            "_posthog/permission_request": lambda event: self._permission(event.params),
            "_posthog/permission_resolved": self._resolved,
            "_posthog/turn_complete": self._turn_complete,
            "_posthog/task_complete": self._turn_complete,
        }
        self._updates: dict[str, Callable[[Json], None]] = {
            "user_message": self._user,
            "user_message_chunk": self._user,
            "agent_message": self._text,
            "agent_message_chunk": self._text,
            "agent_thought_chunk": self._text,
            "tool_call": self._tool_call,
            "tool_call_update": self._tool_call,
            "plan": self._show_plan,
        }

    def event(self, event: Event) -> None:
        """Show one event; kinds that are of no use to a reader are passed over."""
        if event.type == "permission_request":
            self._permission(event.data)
        elif (show := self._methods.get(event.method)) is not None:
            show(event)

    def note(self, text: str) -> None:
        """A remark of the command's own."""
        self._print("note", Text(clean(text), "yellow"))

    def finish(self, run: Run) -> None:
        """The outcome of a run."""
        self._open_tools()
        for line in outcome(run):
            self._print("end", line)

    # --- blocks ---

    def _enter(self, block: str) -> None:
        """End what is open, and set a new kind of block apart."""
        self._end_text()
        if self._step:
            self._console.print()
            self._step = ""
        if self._block and self._block != block:
            self._console.print()
        self._block = block

    def _print(self, block: str, line: Text) -> None:
        self._enter(block)
        self._console.print(line, soft_wrap=True)

    def _write(self, style: str) -> Callable[[str], None]:
        return lambda piece: self._console.print(Text(piece, style), end="", soft_wrap=True)

    # --- progress and notices ---

    def _progress(self, event: Event) -> None:
        params = event.params
        step, status = str(params.get("step", "")), params.get("status")
        label = crop(str(params.get("label") or step), self._console.width - 12)
        time = event.data.get("timestamp")
        if status == "in_progress":
            self._step_times[step] = str(time)
            if self._console.is_terminal:
                self._enter("steps")
                self._console.print(Text(f"… {label}", "dim"), end="", soft_wrap=True)
                self._step = step
            return
        if self._step == step and step:
            self._console.file.write("\r\x1b[2K")  # the line that said it began
            self._step = ""
        took = duration(_moment(self._step_times.pop(step, "")), _moment(time))
        detail = params.get("detail")
        if status == "failed":
            line = Text.assemble(("✗ ", "red"), label)
            reason = str(detail) if detail else ""
        else:
            line = Text.assemble(("✓ ", "green"), label, (f"  {took}" if took else "", "dim"))
            reason = ""
            if detail:
                line.append(f"  {crop(str(detail), 40)}", "dim")
        self._print("steps", line)
        self._told.add(reason)
        for part in clean(reason).splitlines():
            self._print("steps", Text(f"  {part}", "red"))

    def _console_line(self, event: Event) -> None:
        level = event.params.get("level")
        if level in ("warn", "error"):
            mark, style = ("✗", "red") if level == "error" else ("!", "yellow")
            self._warn(event.params.get("message"), mark, style)

    def _error(self, event: Event) -> None:
        message = str(event.params.get("message"))
        if message not in self._told:  # the step that failed, or the turn, has said it
            self._told.add(message)
            self._warn(message, "✗", "red")

    def _warn(self, message: Any, mark: str, style: str) -> None:
        lines = clean(str(message or "no message")).strip().splitlines() or [""]
        self._print("notice", Text(f"{mark} {lines[0]}", style))
        for line in lines[1:]:
            self._print("notice", Text(f"  {line}", style))

    def _sandbox_output(self, event: Event) -> None:
        tool = ToolCall(id="", status="failed" if event.params.get("exitCode") else "completed")
        tool.terminal = "\n".join(str(event.params.get(name) or "") for name in ("stdout", "stderr")).strip()
        for line in tool.outcome(self._console.width):
            self._print("notice", line)

    def _status(self, event: Event) -> None:
        if event.params.get("status") == "compacting" and not event.params.get("isComplete"):
            self._print("notice", Text("The agent shortens its memory of the conversation.", "dim"))

    def _turn_complete(self, event: Event) -> None:
        self._end_text()
        self._open_tools()
        self._said = self._asked = ""
        note = STOP_NOTES.get(str(event.params.get("stopReason")))
        if note is not None:
            self._print("notice", Text(f"! {note}", "yellow"))

    # --- questions ---

    def _permission(self, request: Json) -> None:
        request_id = str(request.get("requestId"))
        if request_id in self._permissions:
            return
        self._permissions.add(request_id)
        call = request.get("toolCall")
        title = call.get("title") if isinstance(call, dict) else None
        self._print(
            "notice",
            Text(f"? The agent asks for permission: {crop(str(title or 'a tool call'), 200)}", "yellow"),
        )
        for option in _list(request.get("options")):
            if isinstance(option, dict):
                choice, name = option.get("optionId"), option.get("name")
                self._print("notice", Text(f"  {clean(str(choice))}: {clean(str(name))}", "yellow"))

    def _resolved(self, event: Event) -> None:
        self._print("notice", Text(f"  answered: {clean(str(event.params.get('optionId')))}", "dim"))

    # --- what agent and user say ---

    def _update(self, event: Event) -> None:
        show = self._updates.get(str(event.update.get("sessionUpdate")))
        if show is not None:
            show(event.update)

    def _user(self, update: Json) -> None:
        text = _content_text(update)
        if not text.strip() or text == self._asked:  # some agents repeat what they were asked
            return
        self._asked, self._said = text, ""
        self._enter("user")
        prose = Prose(self._write("bold"), self._console.width, "› ", "  ")
        lines = text.strip().splitlines()
        prose.feed("\n".join(lines[:MESSAGE_LINES]))
        if len(lines) > MESSAGE_LINES:
            prose.feed(f"\n… {len(lines) - MESSAGE_LINES} more lines")
        prose.end()

    def _text(self, update: Json) -> None:
        kind, text = str(update.get("sessionUpdate")), _content_text(update)
        thought = kind == "agent_thought_chunk"
        if kind == "agent_message" and text == self._said:
            return  # the joined form of the chunks that were shown
        message = ("thought" if thought else "message", update.get("messageId"))
        if self._prose is None or message != self._message or kind == "agent_message":
            if not text.strip():
                return
            again = self._block == message[0]
            self._enter(message[0])
            if again:
                self._console.print()
            self._message, self._said = message, ""
            width = self._console.width
            self._prose = (
                Prose(self._write("dim italic"), width, "· ", "  ")
                if thought
                else Prose(self._write(""), width)
            )
            text = text.lstrip("\n")
        assert self._prose is not None
        before = len(self._said)
        self._said += text
        if thought and len(self._said) > THOUGHT_CHARS:
            text = text[: max(0, THOUGHT_CHARS - before)] + ("…" if before <= THOUGHT_CHARS else "")
        self._prose.feed(text)

    def _end_text(self) -> None:
        if self._prose is not None:
            self._prose.end()
            self._prose = None

    # --- plan and tools ---

    def _show_plan(self, update: Json) -> None:
        entries = {
            str(entry.get("content")): str(entry.get("status"))
            for entry in _list(update.get("entries"))
            if isinstance(entry, dict)
        }
        changed = {text: status for text, status in entries.items() if self._plan.get(text) != status}
        if changed and self._block != "plan":
            self._print("plan", Text("Plan", "bold"))
        for text, status in changed.items():
            mark, style = PLAN_MARKS.get(status, ("☐", ""))
            self._print("plan", Text(f"  {mark} {crop(text, self._console.width - 4)}", style))
        self._plan = entries

    def _tool_call(self, update: Json) -> None:
        tool_id = str(update.get("toolCallId"))
        known = tool_id in self._tools
        tool = self._tools.setdefault(tool_id, ToolCall(id=tool_id))
        tool.merge(update)
        self._end_text()
        # A finished call is not opened again: agents add details to it that were shown already.
        if not tool.done and (known or tool.is_clear()):
            self._show_tool(tool)

    def _show_tool(self, tool: ToolCall) -> None:
        width = self._console.width
        finished = tool.status in DONE
        lines = tool.outcome(width) if finished else []
        if not tool.named or (lines and self._tool != tool.id):
            self._print("tools", tool.heading(width))
            tool.named, self._tool = True, tool.id
        for line in lines:
            self._print("tools", line)
        tool.done = finished

    def _open_tools(self) -> None:
        """Name the calls that were announced and never told more about."""
        for tool in self._tools.values():
            if not tool.named:
                self._show_tool(tool)
        self._tools.clear()


def _content_text(update: Json) -> str:
    content = update.get("content")
    blocks = content if isinstance(content, list) else [content]
    return "".join(
        str(block["text"])
        for block in blocks
        if isinstance(block, dict) and isinstance(block.get("text"), str)
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _moment(text: Any) -> datetime | None:
    """A time, in UTC unless it says otherwise."""
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
