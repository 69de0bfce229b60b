"""What providers have in common whose sandboxes are on an engine: one of containers, or a cluster, here or elsewhere.

The server keeps a folder of each sandbox (hold.py): its lock says who uses the sandbox, and its being there that the
sandbox is wanted. What the engine has of a sandbox that has no folder is removed by the sweep. Commands are carried
(carried.py) over whatever stream the engine has.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import structlog

from taskyard.errors import SetupError
from taskyard.sandbox import carried, sweep
from taskyard.sandbox.base import BaseSandbox, Command
from taskyard.sandbox.carried import CarriedProcess, Order, Wire
from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.hold import Facts, Hold, check_id, is_there
from taskyard.sandbox.place import place_of
from taskyard.sandbox.provider import (
    WORKSPACE,
    Kept,
    Limits,
    Mount,
    Problem,
    SandboxError,
    Spec,
    Swept,
    require,
)
from taskyard.sandbox.rules import environment
from taskyard.settings import Settings
from taskyard.settings.sandboxes import Capability

log = structlog.get_logger()


class RemoteSandbox(BaseSandbox[CarriedProcess]):
    """See provider.Sandbox. A subclass says how it is on its engine."""

    host_programs = False

    def __init__(self, hold: Hold, disk: DiskWatch | None, mounts: Sequence[Mount] = ()) -> None:
        super().__init__(hold, disk, mounts)
        self._wires: set[Wire] = set()
        """Of commands that are starting."""

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

    async def _start(self, command: Command, limits: Limits) -> CarriedProcess:
        order = Order(command.argv, environment(command.env), command.cwd or WORKSPACE, command.seconds)
        wire = await self._wire(command.mounts, command.seconds)
        self._wires.add(wire)
        try:
            process = await carried.start(
                wire,
                order,
                stdin=command.stdin,
                on_listener=command.on_listener,
                scratch=self.scratch,
                max_output=command.max_output,
            )
        finally:
            self._wires.discard(wire)
        self._runs(process)
        return process

    def _end_starts(self) -> list[Coroutine[Any, Any, None]]:
        return [wire.kill() for wire in self._wires]

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

    async def _let_go(self, *, remove: bool) -> None:
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
        self.data_dir = settings.data_dir.absolute()
        self.root = self.data_dir / "sandboxes"

    @cached_property
    def place(self) -> str:
        """The name of our data folder: it tells what is ours on the engine from what other workers have there."""
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return place_of(self.data_dir)

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

    async def _sweep_rest(self, name: str) -> bool:
        # Asked again: it may have been made while those before it were removed.
        if await asyncio.to_thread(is_there, self.root / name):
            return False
        await self.remove_rest(name)
        return True

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
            if await sweep.done(f"rest of {name}", self._sweep_rest(name)):
                swept.sandboxes.append(name)
        keep = await kept(names) if names else frozenset()
        for name in names:
            if name not in keep and await sweep.done(f"sandbox {name}", sweep.remove(self, name, kept)):
                swept.sandboxes.append(name)
        return swept
