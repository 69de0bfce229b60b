"""The provider for one machine: each command runs in its own bubblewrap sandbox over two persistent folders.

bwrap never runs as root, which would be an escape: a server that is root gives each sandbox a uid of its own.
Commands are started from the thread that made the sandbox only, since a sandbox dies with the thread that
forked it (PR_SET_PDEATHSIG). The good side of that is that none outlives the server.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from taskyard.sandbox import cgroups, checks, strays, sweep
from taskyard.sandbox.base import BaseSandbox, Command
from taskyard.sandbox.cgroups import Cgroups, Group
from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.folder import Folder, group_names
from taskyard.sandbox.hold import check_id
from taskyard.sandbox.identities import UidRange
from taskyard.sandbox.launch import Host, command_line, door_command
from taskyard.sandbox.listener import SOURCE, EndedError, open_door
from taskyard.sandbox.policy import Handed, Scene
from taskyard.sandbox.process import BubblewrapProcess, start
from taskyard.sandbox.provider import (
    WORKSPACE,
    Kept,
    KilledError,
    Limits,
    Mount,
    Problem,
    SandboxError,
    Spec,
    Swept,
    require,
)
from taskyard.settings import Settings
from taskyard.settings.sandboxes import Capability

END_S = 5.0
"""A sandbox whose door is gone has this long to end."""


class BubblewrapProvider:
    """See provider.Provider."""

    name = "bubblewrap"

    def __init__(self, settings: Settings) -> None:
        # Absolute: claims on uids name it for all servers of this host.
        self.root = settings.data_dir.absolute() / "sandboxes"
        self._uid_range = settings.sandbox.uid_range
        self._host: Host | None = None
        self._disk = DiskWatch(self.root)

    async def capabilities(self) -> frozenset[Capability]:
        """See provider.Provider."""
        return _able(await self.host())

    async def check(self) -> list[Problem]:
        """See provider.Provider. If nothing fatal is missing, a command is run in a sandbox of its own."""
        problems = [
            await checks.bubblewrap(),
            checks.machine(),
            checks.users(self._uid_range),
            checks.limits(),
        ]
        if not any(problem.fatal for problem in problems):
            problems.append(await checks.start(self))
        return problems

    async def create(self, spec: Spec) -> BubblewrapSandbox:
        host = await self.host()
        require(self.name, _able(host), spec)
        path = self.root / check_id(spec.id)
        await self._remove_dead(spec.id)
        try:
            folder = await asyncio.to_thread(Folder.create, path, spec.limits, host.uids)
        except OSError as error:
            raise SandboxError(f"the folder of a sandbox cannot be made: {error}") from error
        sandbox = BubblewrapSandbox(host, folder, self._disk, spec.mounts)
        try:
            sandbox.limit()
        except BaseException:
            await asyncio.shield(sandbox.destroy())
            raise
        return sandbox

    async def attach(self, sandbox_id: str) -> BubblewrapSandbox | None:
        """See provider.Provider. The mounts of the spec are not kept: give them to each exec."""
        host = await self.host()
        folder = await asyncio.to_thread(Folder.open, self.root / check_id(sandbox_id))
        if folder is None:
            return None
        sandbox = BubblewrapSandbox(host, folder, self._disk)
        try:
            await sandbox.take_over()
            sandbox.limit()
        except BaseException:
            folder.close()
            raise
        return sandbox

    async def _remove_dead(self, sandbox_id: str) -> None:
        """Remove a sandbox of this id that a dead server left, if there is one."""
        # If it is in use, or cannot be removed, then there is none to be made.
        with suppress(SandboxError, OSError):
            if (left := await self.attach(sandbox_id)) is not None:
                await left.destroy()

    async def list(self) -> list[str]:
        try:
            return sorted(await asyncio.to_thread(os.listdir, self.root))
        except FileNotFoundError:
            return []

    async def sweep(self, kept: Kept) -> Swept:
        """See provider.Provider."""
        return await sweep.sweep(self, kept)

    async def close(self) -> None:
        """See provider.Provider."""
        await self._disk.close()

    async def host(self) -> Host:
        """What this machine has for sandboxes. Raises SetupError when it cannot run any."""
        if self._host is None:
            checks.require(await checks.bubblewrap())
            checks.require(checks.machine())
            uids = UidRange.parse(self._uid_range) if os.geteuid() == 0 else None
            groups: Cgroups | None = None
            with suppress(cgroups.UnavailableError):
                groups = cgroups.find()
            self._host = Host(shutil.which("bwrap") or "bwrap", groups, uids)
        return self._host


def _able(host: Host) -> frozenset[Capability]:
    limited: frozenset[Capability] = frozenset({"memory", "cpu", "pids"} if host.cgroups else ())
    return limited | {"disk", "host-programs"}


class BubblewrapSandbox(BaseSandbox[BubblewrapProcess]):
    """See provider.Sandbox. Made by BubblewrapProvider. exec() raises RuntimeError in any thread but its own."""

    host_programs = True

    def __init__(self, host: Host, folder: Folder, disk: DiskWatch, mounts: Sequence[Mount] = ()) -> None:
        super().__init__(folder.hold, disk, mounts)
        self._host = host
        self._folder = folder
        self._group: Group | None = None
        self._beside: Group | None = None
        """Of what looks at its disk, so that what runs in it does not hold that off."""
        if host.cgroups is not None:
            self._group, self._beside = map(host.cgroups.group, group_names(folder.path))
        self._thread = threading.get_ident()

    async def take_over(self) -> None:
        """End what a dead server left running in it, and remove its temporary files. Raises SandboxError."""
        await self._remove_groups()
        root = self._folder.path.parent
        found = await asyncio.to_thread(strays.find, root)
        await strays.end(root, [stray for stray in found if stray.sandbox_id == self.id])
        await self.hold.clear_scratch()

    def limit(self) -> None:
        """Set the limits of the sandbox, where control groups can. Raises SandboxError."""
        if self.hold.limits is not None:
            try:
                for group in filter(None, (self._group, self._beside)):
                    group.create(self.hold.limits)
            except OSError as error:
                raise SandboxError(f"the limits of a sandbox cannot be set: {error}") from error

    async def _remove_groups(self) -> None:
        for group in filter(None, (self._group, self._beside)):
            await group.remove()

    async def _let_go(self, *, remove: bool) -> None:
        await self._remove_groups()
        if remove:
            await self._folder.remove()
        else:
            self._folder.close()

    async def _start(self, command: Command, limits: Limits) -> BubblewrapProcess:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "a sandbox is used from the thread that made it only: it would die with another"
            )
        scene = Scene(
            workspace=str(self._folder.workspace),
            home=str(self._folder.home),
            limits=limits,
            mounts=command.mounts,
            env=dict(command.env),
            cwd=command.cwd or WORKSPACE,
        )
        argv, on_listener = list(command.argv), command.on_listener
        group = self._beside if command.apart else self._group
        info, info_writer = os.pipe()
        channel: socket.socket | None = None
        process: BubblewrapProcess | None = None
        try:
            with Handed() as handed:
                handed.add(info_writer)
                if on_listener is not None:
                    channel, inside = socket.socketpair()
                    argv, needed = door_command(argv, handed.add(inside.detach()))
                    door = await asyncio.to_thread(SOURCE.read_bytes)
                    scene = replace(scene, mounts=(*scene.mounts, *needed), door=door)
                line = command_line(self._host, self._folder, group, scene, argv, handed, info_writer)
                process = await start(
                    line,
                    handed,
                    info,
                    stdin=command.stdin,
                    oom_kills=self._oom_kills,
                    max_output=command.max_output,
                    seconds=command.seconds,
                )
                self._runs(process)
            await process.started()
            if channel is not None and on_listener is not None:
                await open_door(channel, on_listener)
        except BaseException as error:
            if process is None:
                os.close(info)
            else:
                killed = isinstance(error, KilledError)
                if isinstance(error, EndedError):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(END_S):
                            killed = (await process.wait()).reason == "killed"
                await asyncio.shield(process.kill())
                if isinstance(error, SandboxError):
                    said = process.stderr_tail().strip()
                    detail = error.detail if said in error.detail else f"{error.detail}: {said}"
                    raise (KilledError if killed else SandboxError)(detail) from error
            raise
        finally:
            if channel is not None:
                channel.close()
        return process

    def _oom_kills(self) -> int:
        return self._group.oom_kills() if self._group is not None else 0
