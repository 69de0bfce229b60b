"""Processes that see a sandbox folder: the label that nothing in a sandbox can take off.

Every process of a sandbox is in a mount namespace where the sandbox's folder is bound (see launch.py), and
`/proc/PID/mountinfo` names what is bound. So what a dead server left running is found by that, also where there
are no control groups and no uids for sandboxes.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from taskyard.sandbox.provider import SandboxError

_KILL_S = 15.0
_DELETED = "//deleted"
_ESCAPES = str.maketrans({" ": r"\040", "\t": r"\011", "\n": r"\012", "\\": r"\134"})


@dataclass(frozen=True)
class Stray:
    """A process, and the sandbox whose folder it sees."""

    pid: int
    sandbox_id: str
    removed: bool
    """The folder that it sees is not there any more, even if there is a new one of that name."""


def find(root: Path) -> list[Stray]:
    """All processes that see a folder below `root`, the folder of all sandboxes, and do not share our mounts."""
    place = _place(root)
    if place is None:
        return []
    own = _namespace("self")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if _namespace(process.name) != own and (stray := _look(int(process.name), *place)):
            found.append(stray)
    return found


async def end(root: Path, strays: Iterable[Stray]) -> None:
    """Kill processes and wait until they are gone. Raises SandboxError if one outlives it."""
    await asyncio.to_thread(_end, root, list(strays))


def _end(root: Path, strays: list[Stray]) -> None:
    place = _place(root)
    for stray in strays:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(stray.pid)
            try:
                # Looked at again: the number may be another process's by now.
                if place is None or _look(stray.pid, *place) != stray:
                    continue
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                ended = select.poll()
                ended.register(pidfd, select.POLLIN)
                if not ended.poll(_KILL_S * 1000):
                    raise SandboxError(f"process {stray.pid} in {stray.sandbox_id} cannot be killed")
            finally:
                os.close(pidfd)


def _look(pid: int, device: str, folder: str) -> Stray | None:
    try:
        lines = Path(f"/proc/{pid}/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # it has ended
        return None
    for line in lines:
        # proc_pid_mountinfo(5): id, parent, major:minor, root within the filesystem, mount point, …
        fields = line.split(" ", 5)
        if len(fields) > 4 and fields[2] == device and fields[3].startswith(f"{folder}/"):
            path = fields[3].removesuffix(_DELETED)
            sandbox_id = path.removeprefix(f"{folder}/").split("/", 1)[0]
            return Stray(pid, sandbox_id, removed=path != fields[3])
    return None


def _place(path: Path) -> tuple[str, str] | None:
    """Device and path within its filesystem, as mountinfo writes them."""
    try:
        real = str(path.resolve(strict=True)).translate(_ESCAPES)
    except OSError:
        return None
    best: tuple[str, str, str] | None = None
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
        _, _, device, root, point, _ = line.split(" ", 5)
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best[2])):  # a later mount covers an earlier one
            best = (device, root, point)
    if best is None:
        return None
    device, root, point = best
    return device, root.rstrip("/") + real[len(point.rstrip("/")) :]


def _namespace(pid: str) -> Path | None:
    try:
        return Path(f"/proc/{pid}/ns/mnt").readlink()
    except OSError:  # ended, or not ours to look at; its mountinfo may be
        return None
