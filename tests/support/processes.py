"""Processes of a run on this host."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from tests.support.yard import Run, eventually


def agents_of(run_id: str) -> list[int]:
    """Process ids of a run's agent and what it started, outermost first."""
    mark = f"POSTHOG_TASK_RUN_ID={run_id}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return sorted(found)


async def kill_agent(run: Run) -> None:
    """Kill the agent's process from outside, as a machine short of memory does."""

    async def look() -> list[int]:
        return agents_of(run.id)

    pids = await eventually(look, bool, lambda _: f"agent process of {run.id}")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
