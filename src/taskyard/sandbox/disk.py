"""The disk limit of sandboxes: how much their folders hold is measured, and who holds too much is ended.

Measured is inside the sandbox, so that walking through millions of files counts against its own limits, and no
path of the agent's is opened on the host. That is not free, so it is done when the disk has lost space enough to
matter, and from time to time. Between two looks a sandbox can exceed its limit by what the disk takes in a second.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import structlog

from taskyard.errors import TaskyardError
from taskyard.sandbox.provider import FILE_COST, Sandbox

log = structlog.get_logger()

LOOK_S = 1.0
SHARE = 8
"""Measured again when the disk has lost this part of the smallest limit."""
REST_S = 600.0
"""And after this time in any case: of a disk that is not on this host nothing else is known, and files may be moved."""
FAR_REST_S = 60.0
MEASURE_S = 120.0

# Blocks that are there, then the number of files; what cannot be read is counted as far as it goes.
_MEASURE = """
du -sxk -- "$@" 2>/dev/null | { s=0; while read -r n _; do s=$((s+n)); done; echo $s; }
du -sx --inodes -- "$@" 2>/dev/null | { s=0; while read -r n _; do s=$((s+n)); done; echo $s; }
"""


class Watched(Sandbox, Protocol):
    """A sandbox that can be ended because it is full."""

    async def fill_up(self) -> None:
        """End everything in it, with the reason `disk`."""


class DiskWatch:
    """Watches the sandboxes of one provider. folder: where they are; None when that is on another host.

    rest_s: measured again after this time in any case; default REST_S, or FAR_REST_S.
    """

    def __init__(self, folder: Path | None, rest_s: float | None = None) -> None:
        self._folder = folder
        self._rest_s = rest_s or (REST_S if folder is not None else FAR_REST_S)
        self._watched: dict[Watched, int] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, sandbox: Watched, limit_mb: int) -> None:
        """Watch a sandbox in which something runs."""
        self._watched[sandbox] = limit_mb
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch(), name="disk of sandboxes")

    def remove(self, sandbox: Watched) -> None:
        """It is not used any more."""
        self._watched.pop(sandbox, None)

    async def close(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        most, measured_at = self._free(), loop.time()
        while self._watched:
            await asyncio.sleep(LOOK_S)
            free = self._free()
            lost = most - free
            most = max(most, free)
            step = min(self._watched.values(), default=0) * 2**20 / SHARE
            if lost > step or loop.time() - measured_at > self._rest_s:
                for sandbox, limit_mb in list(self._watched.items()):
                    await self._look_at(sandbox, limit_mb)
                most, measured_at = self._free(), loop.time()

    async def _look_at(self, sandbox: Watched, limit_mb: int) -> None:
        if sandbox not in self._watched:
            return
        try:
            used = await measure(sandbox)
        except (TaskyardError, OSError, TimeoutError, ValueError) as error:
            log.debug("cannot measure a sandbox", sandbox=sandbox.id, reason=str(error))
            return
        if used > limit_mb * 2**20 and sandbox in self._watched:
            log.warning("a sandbox is full", sandbox=sandbox.id, used_mb=used // 2**20, limit_mb=limit_mb)
            await sandbox.fill_up()

    def _free(self) -> float:
        """Bytes that the disk still takes, as data or as files."""
        if self._folder is None:
            return 0.0
        with suppress(OSError):
            found = os.statvfs(self._folder)
            # Files that can still be made count as they do in a sandbox.
            return float(found.f_bavail * found.f_frsize + found.f_ffree * FILE_COST)
        return 0.0


async def measure(sandbox: Sandbox) -> int:
    """Bytes that the two folders of a sandbox hold. Raises SandboxError, TimeoutError, ValueError."""
    async with asyncio.timeout(MEASURE_S):
        process = await sandbox.exec(
            ["/bin/sh", "-c", _MEASURE, "sh", sandbox.workspace, sandbox.home], cwd="/"
        )
        try:
            output = await process.stdout.read()
            await process.wait()
        finally:
            await process.kill()
    blocks, files = output.split()
    return int(blocks) * 1024 + int(files) * FILE_COST
