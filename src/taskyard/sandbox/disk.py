"""The disk limit of sandboxes: how much their folders hold is measured, and who holds too much is ended.

Measured is inside the sandbox, so that walking through millions of files counts against its own limits, and no
path of the agent's is opened on the host. That is not free, so it is done when the disk has lost space enough to
matter, and from time to time. Between two looks a sandbox can exceed its limit by what the disk takes in a second.

A sandbox that cannot be measured, time and again, is ended as if it were full: what runs in it may be what prevents it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from taskyard.errors import TaskyardError
from taskyard.sandbox.provider import FILE_COST, AwayError, LostError, Process
from taskyard.sandbox.streams import read_all

log = structlog.get_logger()

LOOK_S = 1.0
SHARE = 8
"""Measured again when the disk has lost this part of the smallest limit."""
REST_S = 600.0
"""And after this time in any case: of a disk that is not on this host nothing else is known, and files may be moved."""
FAR_REST_S = 60.0
MEASURE_S = 120.0
"""Longer than a busy machine takes for millions of files."""
RETRY_S = 20.0
"""After a measurement that failed, the next."""
MOST_FAILED = 3
AT_ONCE = 8
MOST_SAID = 4096

# Blocks that are there, then the number of files; what cannot be read is counted as far as it goes.
_MEASURE = """
du -sxk -- "$@" 2>/dev/null | { s=0; while read -r n _; do s=$((s+n)); done; echo $s; }
du -sx --inodes -- "$@" 2>/dev/null | { s=0; while read -r n _; do s=$((s+n)); done; echo $s; }
"""


class Watched(Protocol):
    """A sandbox that can be ended because it is full."""

    id: str
    workspace: str
    home: str

    async def exec_apart(
        self, argv: Sequence[str], *, cwd: str | None, max_output: int | None, seconds: float | None
    ) -> Process:
        """Sandbox.exec(), which what runs in the sandbox holds off as little as can be."""

    async def fill_up(self, said: str) -> None:
        """End everything in it, with the reason `disk`, and these words at the end of standard error."""


@dataclass
class _Watch:
    """What is known of one sandbox."""

    limit_mb: int
    due: bool = False
    """It is to be measured."""
    not_before: float = 0.0
    failed: int = 0
    """Measurements in a row that failed."""
    look: asyncio.Task[None] | None = None


class DiskWatch:
    """Watches the sandboxes of one provider. folder: where they are; None when that is on another host.

    rest_s: measured again after this time in any case; default REST_S, or FAR_REST_S.
    """

    def __init__(self, folder: Path | None, rest_s: float | None = None) -> None:
        self._folder = folder
        self._rest_s = rest_s or (REST_S if folder is not None else FAR_REST_S)
        self._watched: dict[Watched, _Watch] = {}
        self._task: asyncio.Task[None] | None = None
        self._looks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(AT_ONCE)

    def add(self, sandbox: Watched, limit_mb: int) -> None:
        """Watch a sandbox in which something runs."""
        self._watched.setdefault(sandbox, _Watch(limit_mb))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch(), name="disk of sandboxes")

    def remove(self, sandbox: Watched) -> None:
        """It is not used any more."""
        self._watched.pop(sandbox, None)

    async def close(self) -> None:
        """Watch no more."""
        tasks = [*self._looks, *([] if self._task is None else [self._task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        most, measured_at = self._free(), loop.time()
        while self._watched:
            await asyncio.sleep(LOOK_S)
            free = self._free()
            lost = most - free
            most = max(most, free)
            step = min((watch.limit_mb for watch in self._watched.values()), default=0) * 2**20 / SHARE
            if lost > step or loop.time() - measured_at > self._rest_s:
                most, measured_at = free, loop.time()
                for watch in self._watched.values():
                    watch.due = True
            for sandbox, watch in self._watched.items():
                # None waits for another's, which may take its whole time.
                if (
                    watch.due
                    and loop.time() >= watch.not_before
                    and (watch.look is None or watch.look.done())
                ):
                    watch.due = False
                    watch.look = asyncio.create_task(
                        self._look_at(sandbox, watch), name=f"disk of {sandbox.id}"
                    )
                    self._looks.add(watch.look)
                    watch.look.add_done_callback(self._looks.discard)

    async def _look_at(self, sandbox: Watched, watch: _Watch) -> None:
        async with self._slots:
            if sandbox not in self._watched:
                return
            try:
                used = await measure(sandbox)
            except (TaskyardError, OSError, ValueError) as error:  # a timeout is an OSError
                await self._failed(sandbox, watch, error)
                return
        watch.failed = 0
        if used > watch.limit_mb * 2**20 and sandbox in self._watched:
            held = f"it holds {used // 2**20} MB of {watch.limit_mb} MB"
            log.warning(
                "a sandbox is full", sandbox=sandbox.id, used_mb=used // 2**20, limit_mb=watch.limit_mb
            )
            await sandbox.fill_up(held)

    async def _failed(self, sandbox: Watched, watch: _Watch, error: Exception) -> None:
        if sandbox not in self._watched:
            return
        watch.due, watch.not_before = True, asyncio.get_running_loop().time() + RETRY_S
        reason = str(error) or f"it took longer than {MEASURE_S:g} seconds"
        log.info("cannot measure a sandbox", sandbox=sandbox.id, reason=reason)
        if isinstance(error, AwayError | LostError):
            return  # which is not the sandbox's fault
        watch.failed += 1
        if watch.failed >= MOST_FAILED:
            watch.failed = 0
            log.warning("ending a sandbox that cannot be measured", sandbox=sandbox.id, reason=reason)
            await sandbox.fill_up(
                f"what it holds could not be measured {MOST_FAILED} times in a row: {reason}"
            )

    def _free(self) -> float:
        """Bytes that the disk still takes, as data or as files."""
        if self._folder is None:
            return 0.0
        with suppress(OSError):
            found = os.statvfs(self._folder)
            # Files that can still be made count as they do in a sandbox.
            return float(found.f_bavail * found.f_frsize + found.f_ffree * FILE_COST)
        return 0.0


async def measure(sandbox: Watched) -> int:
    """Bytes that the two folders of a sandbox hold. Raises SandboxError, TimeoutError, ValueError."""
    async with asyncio.timeout(MEASURE_S):
        process = await sandbox.exec_apart(
            ["/bin/sh", "-c", _MEASURE, "sh", sandbox.workspace, sandbox.home],
            cwd="/",
            max_output=MOST_SAID,
            seconds=MEASURE_S,
        )
        try:
            output = await read_all(process, MOST_SAID)
            await process.wait()
        finally:
            await process.kill()
    blocks, files = output.split()
    return int(blocks) * 1024 + int(files) * FILE_COST
