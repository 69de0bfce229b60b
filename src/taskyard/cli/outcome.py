"""The lines at the end of a run: what came of it, how long it took, where the work is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rich.text import Text

from taskyard.cli.text import clean
from taskyard.client.models import Run

MARKS = {"completed": ("✓", "green", "in"), "failed": ("✗", "red", "after")}


def outcome(run: Run) -> Iterator[Text]:
    """The status with time and tokens, then the details."""
    mark, colour, word = MARKS.get(run.status, ("■", "yellow", "after"))
    took = duration(run.created_at, run.completed_at)
    head = Text.assemble((f"{mark} {run.status}", f"bold {colour}"), f" {word} {took}" if took else "")
    if tokens := _tokens(run.state.get("token_usage")):
        head.append(f" · {tokens}", "dim")
    yield head
    yield from _details(run)


def duration(start: datetime | None, end: datetime | None) -> str:
    """A length of time for people; "" for less than a tenth of a second or an unknown one."""
    if start is None or end is None:
        return ""
    seconds = (end - start).total_seconds()
    if seconds < 0.1:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _tokens(usage: Any) -> str:
    """`state.token_usage` in words."""
    if not isinstance(usage, dict):
        return ""

    def number(name: str) -> int:
        value = usage.get(name)
        return value if isinstance(value, int) else 0

    if not number("input_tokens") and not number("output_tokens"):
        return ""
    cached = number("cached_read_tokens")
    into = f"{number('input_tokens'):,} tokens in" + (f" ({cached:,} cached)" if cached else "")
    return f"{into}, {number('output_tokens'):,} out"


def _details(run: Run) -> Iterator[Text]:
    """The lines below the outcome: what went wrong, and where the work is."""
    if run.status != "completed" and run.error_message:
        kind = run.state.get("error_type")
        for line in clean(run.error_message).strip().splitlines():
            yield Text(f"  {line}", "red")
        if isinstance(kind, str):
            yield Text(f"  ({clean(kind)})", "dim")
    output = run.output if isinstance(run.output, dict) else {}
    branch = output.get("head_branch") or (run.branch if output else None)
    if branch:
        yield Text.assemble("  branch ", (clean(str(branch)), "bold"))
    if output.get("pr_url"):
        yield Text.assemble("  pull request ", (clean(str(output["pr_url"])), "bold"))
    rest = {key: value for key, value in output.items() if key not in ("head_branch", "pr_url", "commit_sha")}
    if rest or (run.output is not None and not isinstance(run.output, dict)):
        shown = json.dumps(rest or run.output, indent=2, ensure_ascii=False)
        for line in clean(shown).splitlines():
            yield Text(f"  {line}")
