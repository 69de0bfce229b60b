"""Limits of a sandbox by control groups: one group a sandbox, which all its commands enter as they start.

Version 1: as root, below the group `taskyard` of the controllers pids, memory and cpu, each mounted alone.
Version 2: below the group that was delegated to the server (systemd: `Delegate=cpu memory pids`); root
without one uses `taskyard` at the top. A group must not hold processes and limited groups both, so the
server moves what is in its group, itself included, into the group SERVER beside the sandboxes.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from taskyard.sandbox.provider import Limits, SandboxError

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = ("pids", "memory", "cpu")
SERVER = "taskyard-server"
CONTROL = ".control"
"""Where systemd runs the other commands of a unit with groups below it, such as ExecStartPost=."""
TOP = "taskyard"

_PERIOD_US = 100_000
_KILL_S = 15.0
_POLL_S = 0.01


class UnavailableError(Exception):
    """Why there are no control groups for us, in half a sentence."""


@dataclass(frozen=True)
class Cgroups:
    """Where groups of sandboxes are made: controller to parent folder.

    On version 2 there is one folder for all. On version 1 the entry `unified`, if there, is a folder of the
    second hierarchy, which has no controllers then but can kill a group in one go.
    """

    version: int
    parents: dict[str, Path]

    def names(self) -> set[str]:
        """The groups that exist, of all servers that make theirs in the same place."""
        found: set[str] = set()
        for parent in set(self.parents.values()):
            with suppress(FileNotFoundError):
                found |= {entry.name for entry in os.scandir(parent) if entry.is_dir()}
        return found - {SERVER, CONTROL}

    def group(self, name: str) -> Group:
        """The group of one sandbox, which may or may not exist."""
        return Group(self.version, {key: parent / name for key, parent in self.parents.items()})


@dataclass(frozen=True)
class Group:
    """The control group of one sandbox."""

    version: int
    paths: dict[str, Path]

    @property
    def folders(self) -> list[Path]:
        return list(dict.fromkeys(self.paths.values()))

    def create(self, limits: Limits) -> None:
        """Make the group and set its limits. Raises OSError."""
        for folder in self.folders:
            folder.mkdir(exist_ok=True)
        memory = limits.memory_mb * 1024 * 1024
        quota = max(int(limits.cpus * _PERIOD_US), 1000)
        _write(self.paths["pids"] / "pids.max", limits.pids)
        if self.version == 2:
            _write(self.paths["memory"] / "memory.max", memory)
            _write(self.paths["memory"] / "memory.swap.max", 0, optional=True)
            _write(self.paths["memory"] / "memory.oom.group", 1, optional=True)
            _write(self.paths["cpu"] / "cpu.max", f"{quota} {_PERIOD_US}")
        else:
            _write(self.paths["memory"] / "memory.limit_in_bytes", memory)
            _write(self.paths["memory"] / "memory.memsw.limit_in_bytes", memory, optional=True)
            _write(self.paths["cpu"] / "cpu.cfs_period_us", _PERIOD_US)
            _write(self.paths["cpu"] / "cpu.cfs_quota_us", quota)

    def oom_kills(self) -> int:
        """How often the kernel has killed in it because its memory was used up."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        with suppress(OSError):
            for line in (self.paths["memory"] / name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0

    async def remove(self) -> None:
        """Kill everything in the group and remove it. Raises SandboxError if something outlives it."""
        deadline = asyncio.get_running_loop().time() + _KILL_S
        while not self._remove_now():
            if asyncio.get_running_loop().time() > deadline:
                raise SandboxError(f"processes in the control group {self.folders[0]} cannot be killed")
            await asyncio.sleep(_POLL_S)

    def _remove_now(self) -> bool:
        for folder in self.folders:
            if not folder.exists():
                continue
            if not _write(folder / "cgroup.kill", 1, optional=True):
                _kill(_pids(folder))
            with suppress(FileNotFoundError):
                try:
                    folder.rmdir()
                except OSError:  # busy: what was killed takes a moment to go
                    return False
        return True


def find(root: Path = ROOT, own: Path = Path("/proc/self/cgroup"), *, euid: int | None = None) -> Cgroups:
    """The control groups that this process may use, ready for groups of sandboxes.

    Raises UnavailableError if it may use none.
    """
    privileged = (os.geteuid() if euid is None else euid) == 0
    try:
        if (root / "cgroup.controllers").exists():
            return Cgroups(2, dict.fromkeys(CONTROLLERS, _version_2(root, own, privileged)))
        return Cgroups(1, _version_1(root, privileged))
    except OSError as error:
        raise UnavailableError(f"{error.filename or root}: {error.strerror}") from error


def _version_1(root: Path, privileged: bool) -> dict[str, Path]:
    if not privileged:
        raise UnavailableError("this system has control groups of version 1, which only root can use")
    missing = [name for name in CONTROLLERS if not (root / name / "cgroup.procs").exists()]
    if missing:
        raise UnavailableError(f"the controllers {', '.join(missing)} are not mounted in {root}")
    unified = ["unified"] if (root / "unified" / "cgroup.procs").exists() else []
    parents = {name: root / name / TOP for name in (*CONTROLLERS, *unified)}
    for parent in parents.values():
        parent.mkdir(exist_ok=True)
    return parents


def _version_2(root: Path, own: Path, privileged: bool) -> Path:
    line = next((line for line in own.read_text().splitlines() if line.startswith("0::/")), None)
    if line is None:
        raise UnavailableError("this process is in no control group")
    mine = root / line.removeprefix("0::/")
    placed = mine.name in (SERVER, CONTROL)
    parent = mine.parent if placed else mine
    if privileged and not _delegated(parent):
        _enable(root)
        parent = root / TOP
        parent.mkdir(exist_ok=True)
    elif not os.access(parent, os.W_OK) or not os.access(parent / "cgroup.subtree_control", os.W_OK):
        raise UnavailableError("no control group is delegated to this user")
    elif not placed:
        _require(parent)  # before anything is moved
        _move(parent, parent / SERVER)
    _enable(parent)
    return parent


def _delegated(group: Path) -> bool:
    """Whether systemd gave the group to us; it marks such groups (systemd's CGROUP_DELEGATION.md)."""
    for name in ("trusted.delegate", "user.delegate"):
        with suppress(OSError):
            return os.getxattr(group, name) == b"1"
    return False


def _require(group: Path) -> None:
    available = (group / "cgroup.controllers").read_text().split()
    missing = [name for name in CONTROLLERS if name not in available]
    if missing:
        raise UnavailableError(f"the controllers {', '.join(missing)} are not available in {group}")


def _enable(group: Path) -> None:
    _require(group)
    enabled = (group / "cgroup.subtree_control").read_text().split()
    if not set(CONTROLLERS) <= set(enabled):
        _write(group / "cgroup.subtree_control", " ".join(f"+{name}" for name in CONTROLLERS))


def _move(group: Path, below: Path) -> None:
    below.mkdir(exist_ok=True)
    while pids := _pids(group):
        for pid in pids:
            with suppress(ProcessLookupError):
                _write(below / "cgroup.procs", pid)


def _pids(group: Path) -> list[int]:
    try:
        pids = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    except OSError:  # removed in this moment
        return []
    return [pid for pid in pids if pid > 0]  # 0 is a process that this process namespace does not see


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _write(path: Path, value: object, *, optional: bool = False) -> bool:
    """Write a value; False when the file is not there and may be missing."""
    try:
        file = os.open(path, os.O_WRONLY)  # never creates; only root may read cgroup.kill as well
    except FileNotFoundError:
        if not optional:
            raise
        return False
    try:
        os.write(file, str(value).encode())
    finally:
        os.close(file)
    return True
