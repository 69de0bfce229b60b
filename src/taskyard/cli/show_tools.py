"""Tool calls of the agent, as lines on a terminal."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from taskyard.cli.text import crop, fit, output_lines

Json = dict[str, Any]

HEAD, TAIL = 3, 5
"""Lines of a tool's output that are shown: its start, and its end, where the outcome stands."""
DIFF_LINES = 30
_WORKSPACE = re.compile(r"^/tmp/workspace/(?:repos/[^/]+/[^/]+/)?")
DONE = frozenset({"completed", "failed"})


@dataclass
class ToolCall:
    """What is known of one tool call: its updates, merged."""

    id: str
    title: str = ""
    kind: str = ""
    status: str = "pending"
    raw_input: Any = None
    raw_output: Any = None
    content: list[Any] = field(default_factory=list)
    terminal: str = ""
    exit_note: str = ""
    named: bool = False
    """Its title line has been shown."""
    done: bool = False
    """Its outcome has been shown."""

    def merge(self, update: Json) -> None:
        """Take in a `tool_call` or `tool_call_update`: a field that is there replaces the one before."""
        for name, kind in (("title", str), ("kind", str), ("status", str), ("content", list)):
            if isinstance(value := update.get(name), kind):
                setattr(self, name, value)
        self.raw_input = update.get("rawInput") or self.raw_input
        self.raw_output = update.get("rawOutput") or self.raw_output
        meta = update.get("_meta")
        if isinstance(meta, dict):
            for name in ("terminal_output", "terminal_output_delta"):
                if isinstance(piece := meta.get(name), dict) and isinstance(piece.get("data"), str):
                    self.terminal += piece["data"]
            if isinstance(end := meta.get("terminal_exit"), dict) and end.get("exit_code"):
                self.exit_note = f" (exit code {end['exit_code']})"

    def is_clear(self) -> bool:
        """Whether it is known what the call does: agents announce calls before the arguments are there."""
        return self.status != "pending" or bool(self.raw_input) or bool(self.content)

    def heading(self, width: int) -> Text:
        """The line that names the call."""
        command = self.raw_input.get("command") if isinstance(self.raw_input, dict) else None
        if isinstance(command, list):
            command = " ".join(map(str, command))
        title = self.title.replace("`", "").strip()
        if self.kind == "execute" and isinstance(command, str) and command.strip():
            if title and title in command:
                command = title  # without the shell that some agents wrap around it
            return Text.assemble(("● ", "cyan"), ("$ " + crop(command, width - 4), "bold"))
        return Text.assemble(("● ", "cyan"), (crop(title or self.kind or "tool call", width - 2), "bold"))

    def outcome(self, width: int) -> list[Text]:
        """What came of the call: diffs, or its output in short."""
        lines: list[Text] = []
        texts: list[str] = []
        for item in self.content:
            if not isinstance(item, dict):
                continue
            if item.get("type") == "diff":
                lines += diff(item, width)
            elif isinstance(inner := item.get("content"), dict) and isinstance(inner.get("text"), str):
                texts.append(_unfenced(inner["text"]))
        failed = self.status == "failed"
        if not texts and self.terminal:
            texts = [self.terminal]
        elif not texts and (failed or not lines) and isinstance(self.raw_output, str):
            texts = [self.raw_output]
        if texts and any(text.strip() for text in texts) and (failed or not lines):
            style = "red" if failed else "dim"
            for line in output_lines("\n".join(texts), HEAD, TAIL):
                lines.append(Text(f"  │ {fit(line, width - 4)}".rstrip(), style))
        if failed:
            lines.append(Text(f"  ✗ failed{self.exit_note}", "red"))
        return lines


def diff(item: Json, width: int) -> list[Text]:
    """A changed file: a line with its path and the numbers of lines, then the changes in short."""
    old, new = _lines(item.get("oldText")), _lines(item.get("newText"))
    body = list(difflib.unified_diff(old, new, n=2, lineterm=""))[2:]
    added = sum(line.startswith("+") for line in body)
    removed = sum(line.startswith("-") for line in body)
    path = crop(_WORKSPACE.sub("", str(item.get("path") or "a file")), width - 20)
    lines = [Text.assemble(("  " + path, "bold"), (f"  +{added}", "green"), (f" -{removed}", "red"))]
    if not old:
        body = body[1:]  # the position says nothing about a new file
    for line in body[:DIFF_LINES]:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        lines.append(Text(f"  {fit(line, width - 2)}", style))
    if len(body) > DIFF_LINES:
        lines.append(Text(f"  … {len(body) - DIFF_LINES} more lines", "dim"))
    return lines


def _lines(text: Any) -> list[str]:
    return text.splitlines() if isinstance(text, str) else []


def _unfenced(text: str) -> str:
    """Output without the Markdown fence that some agents put around it."""
    lines = text.strip().split("\n")
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1] == "```":
        return "\n".join(lines[1:-1])
    return text
