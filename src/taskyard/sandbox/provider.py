"""What a sandbox provider is: the interface that the rest of the server uses, and its plain data."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from taskyard.errors import TaskyardError
from taskyard.settings.sandboxes import Capability

WORKSPACE = "/tmp/workspace"  # noqa: S108 - a path inside
HOME = "/home/agent"
LISTENER = ("127.0.0.1", 3128)
"""Where the socket that a ListenerHandler gets is bound, inside the sandbox."""
LINE_BYTES = 64 * 1024 * 1024
"""The longest line that Process.stdout.readline() returns."""
STDERR_BYTES = 8 * 1024
"""How much of the end of standard error is kept."""
FILE_COST = 4096
"""Bytes that a file counts besides its content: a disk holds only so many files, however empty."""

ListenerHandler = Callable[[socket.socket], Awaitable[None]]
"""Gets the listening socket that was bound inside the sandbox, and owns it. The command starts when the
handler returns, so it must return soon and accept in the background."""


Kept = Callable[[Collection[str]], Awaitable[Set[str]]]
"""Which of these ids of sandboxes that nobody may hold will be attached again."""

Reason = Literal["exited", "killed", "oom", "disk", "output", "timeout"]
"""How a command came to its end: by itself, from outside, or by the limit of that name."""


class SandboxError(TaskyardError):
    """The sandbox could not be made or used."""

    code = "sandbox_failed"


class KilledError(SandboxError):
    """A program in the sandbox was killed from outside, not by its caller: doing it again may well succeed."""


class AwayError(SandboxError):
    """What makes sandboxes cannot be reached, or refuses: it says nothing about the sandbox itself."""


class LostError(SandboxError):
    """The sandbox itself is gone: nothing more can be done in it, and nothing of it can be kept."""


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use, all its programs together."""

    cpus: float
    memory_mb: int
    pids: int
    tmp_mb: int
    """Size of the sandbox's temporary folder; it counts as memory."""
    disk_mb: int | None = None
    """What its two folders may hold together, FILE_COST for each file included; None: anything."""


@dataclass(frozen=True)
class Mount:
    """A host file or folder, seen inside under an absolute path.

    symlink: nothing is mounted; `target` becomes a symbolic link to the path `source`, inside.
    """

    source: Path
    target: str
    writable: bool = False
    symlink: bool = False


@dataclass(frozen=True)
class Spec:
    """A sandbox to be made."""

    id: str
    """Letters, digits, `.`, `_` and `-`; unique on the host; the run id."""
    limits: Limits
    mounts: tuple[Mount, ...] = ()
    image: str | None = None
    """The container image that it is made of; None: as the provider has it."""
    needs: frozenset[Capability] = frozenset()
    """A provider that lacks one of these makes no such sandbox."""


@dataclass(frozen=True)
class Exit:
    """How a command ended. code: its exit status, or 128 + signal number."""

    code: int
    reason: Reason
    stderr_tail: str


@dataclass(frozen=True)
class Problem:
    """One thing that was checked on this machine, good or bad.

    detail: what was found. remedy: what to do about it, empty if ok. fatal: without it nothing can run.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    fatal: bool = False


@dataclass
class Swept:
    """What was removed, by name."""

    sandboxes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    """Control groups without a sandbox."""
    processes: list[int] = field(default_factory=list)
    """Processes on the host without a sandbox."""


_WITHOUT: dict[Capability, str] = {
    "memory": "does not limit memory here",
    "cpu": "does not limit processor time here",
    "pids": "does not limit the number of processes here",
    "disk": "does not limit disk space here",
    "kernel": "shares the kernel of its host",
    "host-programs": "does not have the programs of the host",
    "image": "makes sandboxes of the host's programs, not of images",
}


def require(name: str, able: Set[Capability], spec: Spec) -> None:
    """Refuse a sandbox that the provider `name` could not make as it is asked for. Raises SandboxError."""
    needs: set[Capability] = {*spec.needs, *({"image"} if spec.image is not None else ())}
    lacks = [_WITHOUT[need] for need in sorted(needs - able)]
    if lacks:
        raise SandboxError(
            f"the sandbox provider '{name}' {', and '.join(lacks)}; the run needs that: use another provider, or ask"
            " for less (TASKYARD_SANDBOX__REQUIRE, the image of the environment)"
        )


class Process(Protocol):
    """A running command of a sandbox."""

    @property
    def pid(self) -> int:
        """Process id on the host of what keeps the command; for logs."""

    @property
    def stdin(self) -> asyncio.StreamWriter | None: ...

    @property
    def stdout(self) -> asyncio.StreamReader:
        """Lines of up to LINE_BYTES. Little is read ahead: a command that writes more waits."""

    def stderr_tail(self) -> str:
        """The last STDERR_BYTES of standard error so far."""

    async def wait(self) -> Exit:
        """Until the command has ended; whatever it left running is gone then, too."""

    async def kill(self) -> None:
        """End the command and all that it started, by force; returns when they are gone. Idempotent.

        Output that was not read yet may be lost.
        """

    async def terminate(self, grace_s: float) -> None:
        """Ask the command to end (SIGTERM), give it `grace_s` seconds, then kill()."""


class Sandbox(Protocol):
    """One sandbox. Its two folders live until destroy(); each command sees them, and nothing else of others."""

    @property
    def id(self) -> str: ...

    @property
    def workspace(self) -> str:
        """Absolute path inside; writable."""

    @property
    def home(self) -> str:
        """Absolute path inside; writable."""

    @property
    def host_programs(self) -> bool:
        """Whether it has the programs of the host; else those of an image."""

    @property
    def scratch(self) -> Path:
        """A folder on the host for the server's own temporary files about this sandbox; it goes with it."""

    async def exec(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] = {},
        cwd: str | None = None,
        stdin: bool = False,
        mounts: Sequence[Mount] = (),
        on_listener: ListenerHandler | None = None,
        max_output: int | None = None,
        seconds: float | None = None,
    ) -> Process:
        """Start a command.

        env: added to PATH, HOME, USER, LANG, TERM and TMPDIR, which are always set. cwd: absolute path
        inside, default the workspace. stdin: whether the command gets a standard input; without, it is empty.
        mounts: extra ones, for this command only. on_listener: the command's one way out; without, it
        has no network at all. max_output: bytes that it may write to standard output and error; beyond, it is ended.
        seconds: after them it is ended, also where the server cannot do that any more.

        Raises SandboxError when it cannot start. A command that does not exist ends with an exit status
        that is not 0 and says so on standard error.
        """

    async def detach(self) -> None:
        """End everything in it and let go of it; its folders stay, for Provider.attach."""

    async def destroy(self) -> None:
        """End everything in it and remove it. Idempotent; a failed attempt may be repeated."""


class Provider(Protocol):
    """Makes sandboxes on one kind of host."""

    name: str

    async def capabilities(self) -> frozenset[Capability]:
        """What it can do here. Raises SetupError when it can make no sandbox."""

    async def check(self) -> list[Problem]:
        """Everything the provider needs of this machine, whether or not it is there."""

    async def create(self, spec: Spec) -> Sandbox:
        """A new, empty sandbox, in place of one of this id that a dead server left.

        Raises SetupError (this machine cannot), SandboxError (this one cannot, or not what it needs).
        """

    async def attach(self, sandbox_id: str) -> Sandbox | None:
        """A sandbox left behind by a server that is gone, or None if there is none of this id.

        Nothing runs in it any more, and its two folders are as they were. Raises SandboxError while another process
        uses it.
        """

    async def list(self) -> list[str]:
        """Ids of the sandboxes that exist on this host, in use or left behind."""

    async def sweep(self, kept: Kept) -> Swept:
        """Remove what dead servers left: sandboxes that nobody holds and that are not kept, and parts of such.

        What cannot be removed is logged and left for the next time. Several servers may do this at once. Raises what
        `kept` raises; then no sandbox is touched whose owner is not known.
        """

    async def close(self) -> None:
        """Let go of connections; the sandboxes were detached or destroyed."""
