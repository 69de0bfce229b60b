"""What providers have in common whose sandboxes are on an engine: one of containers, or a cluster, here or elsewhere.

The server keeps a folder of each sandbox (hold.py): its lock says who uses the sandbox, and its being there that the
sandbox is wanted. What the engine has of a sandbox that has no folder is removed by the sweep. Commands are carried
(carried.py) over whatever stream the engine has.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from taskyard.errors import SetupError
from taskyard.sandbox import carried, sweep
from taskyard.sandbox.carried import CarriedProcess, Order, Wire
from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.hold import Facts, Hold, check_id
from taskyard.sandbox.provider import (
    HOME,
    WORKSPACE,
    Kept,
    ListenerHandler,
    Mount,
    Problem,
    SandboxError,
    Spec,
    Swept,
    require,
)
from taskyard.sandbox.rules import environment
from taskyard.settings import Capability, Settings

log = structlog.get_logger()


class RemoteSandbox(ABC):
    """See provider.Sandbox. A subclass says how it is on its engine.

    disk: None where the engine itself holds the limit.
    """

    workspace = WORKSPACE
    home = HOME
    host_programs = False

    def __init__(self, hold: Hold, disk: DiskWatch | None, mounts: Sequence[Mount] = ()) -> None:
        self.id = hold.path.name
        self.hold = hold
        self._disk = disk
        self._mounts = tuple(mounts)
        self._processes: set[CarriedProcess] = set()
        self._wires: set[Wire] = set()
        """Of commands that are starting."""
        self._starting: set[asyncio.Future[None]] = set()
        self._ending: asyncio.Task[None] | None = None

    @property
    def scratch(self) -> Path:
        return self.hold.scratch

    # --- how it is on the engine ---

    @abstractmethod
    async def make(self) -> None:
        """Make a new one. Raises SandboxError; then remove_all() comes."""

    @abstractmethod
    async def take_over(self) -> None:
        """End all that a dead server left running in it. Sets hold.limits to None if it is damaged.

        Raises SandboxError.
        """

    @abstractmethod
    async def open_wire(self, mounts: Sequence[Mount], seconds: float | None) -> Wire:
        """Start a carrier in it (carried.COMMAND). Never cancelled. Raises SandboxError, KilledError.

        seconds: when its command ends by itself at the latest.
        """

    @abstractmethod
    async def remove_all(self) -> None:
        """Remove all that the engine has of it; nothing of the server's runs in it any more. Idempotent.

        Raises SandboxError.
        """

    # --- what its user sees ---

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
    ) -> CarriedProcess:
        """See provider.Sandbox."""
        if not argv:
            raise ValueError("a command has at least one item")
        if self._ending is not None:
            raise SandboxError(f"the sandbox {self.id} is destroyed")
        if self.hold.limits is None:
            raise SandboxError(f"the sandbox {self.id} is damaged: it can only be destroyed")
        order = Order(argv, environment(env), cwd or WORKSPACE, seconds)
        starting = asyncio.get_running_loop().create_future()
        self._starting.add(starting)
        wire: Wire | None = None
        try:
            wire = await self._wire((*self._mounts, *mounts), seconds)
            self._wires.add(wire)
            process = await carried.start(
                wire,
                order,
                stdin=stdin,
                on_listener=on_listener,
                scratch=self.scratch,
                max_output=max_output,
            )
            self._processes = {process, *(other for other in self._processes if not other.closed)}
        finally:
            if wire is not None:
                self._wires.discard(wire)
            self._starting.discard(starting)
            starting.set_result(None)
        if self._disk is not None and self.hold.limits.disk_mb is not None:
            self._disk.add(self, self.hold.limits.disk_mb)
        return process

    async def fill_up(self) -> None:
        """End everything in it because it holds more than its limit of disk space."""
        await asyncio.gather(*(process.kill("disk") for process in self._processes))

    async def destroy(self) -> None:
        await self._end(remove=True)

    async def detach(self) -> None:
        await self._end(remove=False)

    async def _wire(self, mounts: Sequence[Mount], seconds: float | None) -> Wire:
        """open_wire(), of which nothing is left when the caller is cancelled."""
        opening = asyncio.ensure_future(self.open_wire(mounts, seconds))

        async def undo() -> None:
            with suppress(SandboxError):
                wire = await opening
                await wire.kill()
                await wire.end()

        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.shield(undo())
            raise

    async def _end(self, *, remove: bool) -> None:
        if self._ending is None or (self._ending.done() and self._ending.exception()):
            self._ending = asyncio.create_task(self._free(remove=remove), name=f"free {self.id}")
        await asyncio.shield(self._ending)

    async def _free(self, *, remove: bool) -> None:
        if self._disk is not None:
            self._disk.remove(self)
        while self._processes or self._starting:
            processes, self._processes = self._processes, set()
            ends = [process.kill() for process in processes] + [wire.kill() for wire in self._wires]
            await asyncio.gather(*ends, *self._starting)
        if not remove:
            self.hold.close()
            return
        if self.hold.closed:  # an earlier attempt has failed
            again = await asyncio.to_thread(Hold.open, self.hold.path)
            if again is None:
                return
            self.hold = again
        try:
            await self.remove_all()
            await self.hold.remove()
        finally:
            # If the engine is away: whoever sweeps next can take it.
            self.hold.close()


class RemoteProvider(ABC):
    """See provider.Provider. A subclass says what its engine does."""

    name: str

    def __init__(self, settings: Settings) -> None:
        self.root = settings.data_dir.absolute() / "sandboxes"

    # --- how it is on the engine ---

    @abstractmethod
    async def capabilities(self) -> frozenset[Capability]:
        """See provider.Provider."""

    @abstractmethod
    async def check(self) -> list[Problem]:
        """See provider.Provider."""

    @abstractmethod
    async def close(self) -> None:
        """See provider.Provider."""

    @abstractmethod
    def sandbox(self, hold: Hold, mounts: Sequence[Mount] = ()) -> RemoteSandbox:
        """The sandbox that a folder stands for; capabilities() was asked before."""

    @abstractmethod
    async def engine_has(self) -> set[str]:
        """Ids of the sandboxes of this data folder that the engine has anything of. Raises SandboxError."""

    @abstractmethod
    async def remove_rest(self, sandbox_id: str) -> None:
        """Remove what the engine has of a sandbox that has no folder. Raises SandboxError."""

    def facts(self, spec: Spec) -> Facts:
        """What the record of a new sandbox has besides its limits."""
        return {"image": spec.image}

    # --- what its user sees ---

    async def create(self, spec: Spec) -> RemoteSandbox:
        require(self.name, await self.capabilities(), spec)
        path = self.root / check_id(spec.id)
        # If it is in use, or cannot be removed, then there is none to be made.
        with suppress(SandboxError, OSError):
            if (left := await self.attach(spec.id)) is not None:
                await left.destroy()
        try:
            hold = await asyncio.to_thread(Hold.create, path, spec.limits, lambda: self.facts(spec))
        except OSError as error:
            raise SandboxError(f"the folder of a sandbox cannot be made: {error}") from error
        sandbox = self.sandbox(hold, spec.mounts)
        try:
            await sandbox.make()
        except BaseException:
            with suppress(SandboxError):  # what is left is for the sweep
                await asyncio.shield(sandbox.destroy())
            raise
        return sandbox

    async def attach(self, sandbox_id: str) -> RemoteSandbox | None:
        """See provider.Provider. The mounts of the spec are not kept: give them to each exec."""
        await self.capabilities()
        hold = await asyncio.to_thread(Hold.open, self.root / check_id(sandbox_id))
        if hold is None:
            return None
        sandbox = self.sandbox(hold)
        try:
            await sandbox.take_over()
            await hold.clear_scratch()
        except BaseException:
            hold.close()
            raise
        return sandbox

    async def list(self) -> list[str]:
        try:
            return sorted(path.name for path in await asyncio.to_thread(lambda: [*self.root.iterdir()]))
        except FileNotFoundError:
            return []

    async def sweep(self, kept: Kept) -> Swept:
        """See provider.Provider."""
        swept = Swept()
        try:
            await self.capabilities()
            there = await self.engine_has()
        except (SandboxError, SetupError) as error:
            log.warning("cannot look for leftovers of sandboxes", reason=error.detail)
            return swept
        # Asked for after the engine: the folder of what is made meanwhile is seen, since it is made first.
        names = await self.list()
        for name in sorted(there.difference(names)):
            if await sweep.done(f"rest of {name}", self.remove_rest(name)):
                swept.sandboxes.append(name)
        keep = await kept(names) if names else frozenset()
        for name in names:
            if name not in keep and await sweep.done(f"sandbox {name}", sweep.remove(self, name, kept)):
                swept.sandboxes.append(name)
        return swept
