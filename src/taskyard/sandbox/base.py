"""What all sandboxes do alike: they count what runs in them, and are let go of when nothing does."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypedDict, TypeVar, Unpack

from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.hold import Hold
from taskyard.sandbox.provider import (
    HOME,
    WORKSPACE,
    Limits,
    ListenerHandler,
    Mount,
    Process,
    Reason,
    SandboxError,
)


class Options(TypedDict, total=False):
    """The options of provider.Sandbox.exec()."""

    env: Mapping[str, str]
    cwd: str | None
    stdin: bool
    mounts: Sequence[Mount]
    on_listener: ListenerHandler | None
    max_output: int | None
    seconds: float | None


@dataclass(frozen=True)
class Command:
    """What exec() is asked for; mounts: those of the sandbox come first."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    stdin: bool = False
    mounts: Sequence[Mount] = ()
    on_listener: ListenerHandler | None = None
    max_output: int | None = None
    seconds: float | None = None
    apart: bool = False
    """Of the server's: what runs in the sandbox should not be able to hold it off."""


class OwnProcess(Process, Protocol):
    """A process as its own sandbox sees it."""

    @property
    def closed(self) -> bool:
        """Ended, with all output read or given up."""

    async def kill(self, why: Reason = "killed") -> None:
        """See provider.Process. why: what wait() tells as the reason."""

    def remark(self, text: str) -> None:
        """Add a line of the server's to standard error."""


P = TypeVar("P", bound=OwnProcess)


class BaseSandbox(ABC, Generic[P]):
    """The common part of a provider.Sandbox: a subclass starts commands, and frees what they leave.

    hold: its folder on this host. disk: None where nobody has to look after the limit.
    """

    workspace = WORKSPACE
    home = HOME
    host_programs: ClassVar[bool]

    def __init__(self, hold: Hold, disk: DiskWatch | None, mounts: Sequence[Mount] = ()) -> None:
        self.id = hold.path.name
        self.hold = hold
        self._disk = disk
        self._mounts = tuple(mounts)
        self._processes: set[P] = set()
        self._starting: set[asyncio.Future[None]] = set()
        self._ending: asyncio.Task[None] | None = None

    @property
    def scratch(self) -> Path:
        return self.hold.scratch

    @abstractmethod
    async def _start(self, command: Command, limits: Limits) -> P:
        """Start it, and tell `_runs`. Raises SandboxError."""

    @abstractmethod
    async def _let_go(self, *, remove: bool) -> None:
        """Nothing runs in it any more: remove it, or keep it for whoever attaches it. Raises SandboxError."""

    def _end_starts(self) -> list[Coroutine[Any, Any, None]]:
        """What ends commands that are no processes yet."""
        return []

    def _runs(self, process: P) -> None:
        """It has to end before the sandbox is let go of."""
        self._processes = {process, *(other for other in self._processes if not other.closed)}

    async def exec(self, argv: Sequence[str], **options: Unpack[Options]) -> P:
        """See provider.Sandbox."""
        process = await self._exec(Command(argv, **options))
        limits = self.hold.limits
        if (
            self._disk is not None
            and limits is not None
            and limits.disk_mb is not None
            and self._ending is None
        ):
            self._disk.add(self, limits.disk_mb)
        return process

    async def exec_apart(self, argv: Sequence[str], **options: Unpack[Options]) -> P:
        """exec() for a look at the sandbox, which what runs there holds off as little as can be."""
        return await self._exec(Command(argv, **options, apart=True))

    async def _exec(self, command: Command) -> P:
        if not command.argv:
            raise ValueError("a command has at least one item")
        if self._ending is not None:
            raise SandboxError(f"the sandbox {self.id} is destroyed")
        limits = self.hold.limits
        if limits is None:
            raise SandboxError(f"the sandbox {self.id} is damaged: it can only be destroyed")
        starting = asyncio.get_running_loop().create_future()
        self._starting.add(starting)
        try:
            return await self._start(replace(command, mounts=(*self._mounts, *command.mounts)), limits)
        finally:
            self._starting.discard(starting)
            starting.set_result(None)

    async def fill_up(self, said: str) -> None:
        """End everything in it because it holds more than its limit of disk space; said: what is known of that."""
        for process in self._processes:
            process.remark(said)
        await asyncio.gather(*(process.kill("disk") for process in self._processes))

    async def destroy(self) -> None:
        """See provider.Sandbox."""
        await self._end(remove=True)

    async def detach(self) -> None:
        """See provider.Sandbox."""
        await self._end(remove=False)

    async def _end(self, *, remove: bool) -> None:
        if self._ending is None or (self._ending.done() and self._ending.exception()):
            self._ending = asyncio.create_task(self._free(remove=remove), name=f"free {self.id}")
        await asyncio.shield(self._ending)

    async def _free(self, *, remove: bool) -> None:
        if self._disk is not None:
            self._disk.remove(self)
        while self._processes or self._starting:
            processes, self._processes = self._processes, set()
            ends = [process.kill() for process in processes] + self._end_starts()
            await asyncio.gather(*ends, *self._starting)
        await self._let_go(remove=remove)
