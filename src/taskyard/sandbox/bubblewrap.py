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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from taskyard.sandbox import cgroups, checks, strays, sweep
from taskyard.sandbox.cgroups import Cgroups
from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.folder import Folder, group_name
from taskyard.sandbox.hold import check_id
from taskyard.sandbox.identities import UidRange
from taskyard.sandbox.launch import Host, command_line, door_command
from taskyard.sandbox.listener import SOURCE, EndedError, open_door
from taskyard.sandbox.policy import Handed, Scene
from taskyard.sandbox.process import BubblewrapProcess, start
from taskyard.sandbox.provider import (
    HOME,
    WORKSPACE,
    Kept,
    KilledError,
    ListenerHandler,
    Mount,
    Problem,
    SandboxError,
    Spec,
    Swept,
    require,
)
from taskyard.settings import Capability, Settings

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


class BubblewrapSandbox:
    """See provider.Sandbox. Made by BubblewrapProvider."""

    workspace = WORKSPACE
    home = HOME
    host_programs = True

    def __init__(self, host: Host, folder: Folder, disk: DiskWatch, mounts: Sequence[Mount] = ()) -> None:
        self.id = folder.path.name
        self._host = host
        self._folder = folder
        self._disk = disk
        self._mounts = tuple(mounts)
        self._group = host.cgroups.group(group_name(folder.path)) if host.cgroups else None
        self._thread = threading.get_ident()
        self._processes: set[BubblewrapProcess] = set()
        self._starting: set[asyncio.Future[None]] = set()
        self._destruction: asyncio.Task[None] | None = None

    @property
    def scratch(self) -> Path:
        return self._folder.scratch

    async def take_over(self) -> None:
        """End what a dead server left running in it, and remove its temporary files. Raises SandboxError."""
        if self._group is not None:
            await self._group.remove()
        root = self._folder.path.parent
        found = await asyncio.to_thread(strays.find, root)
        await strays.end(root, [stray for stray in found if stray.sandbox_id == self.id])
        await self._folder.clear_scratch()

    def limit(self) -> None:
        """Set the limits of the sandbox, where control groups can. Raises SandboxError."""
        if self._group is not None and self._folder.limits is not None:
            try:
                self._group.create(self._folder.limits)
            except OSError as error:
                raise SandboxError(f"the limits of a sandbox cannot be set: {error}") from error

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
    ) -> BubblewrapProcess:
        """See provider.Sandbox. Raises RuntimeError in another thread than the one that made the sandbox."""
        if not argv:
            raise ValueError("a command has at least one item")
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "a sandbox is used from the thread that made it only: it would die with another"
            )
        if self._destruction is not None:
            raise SandboxError(f"the sandbox {self.id} is destroyed")
        if self._folder.limits is None:
            raise SandboxError(f"the folder of the sandbox {self.id} is damaged: it can only be destroyed")
        scene = Scene(
            workspace=str(self._folder.workspace),
            home=str(self._folder.home),
            limits=self._folder.limits,
            mounts=(*self._mounts, *mounts),
            env=dict(env),
            cwd=cwd or WORKSPACE,
        )
        starting = asyncio.get_running_loop().create_future()
        self._starting.add(starting)
        try:
            process = await self._start(list(argv), scene, stdin, on_listener, max_output, seconds)
        finally:
            self._starting.discard(starting)
            starting.set_result(None)
        if self._folder.limits.disk_mb is not None:
            self._disk.add(self, self._folder.limits.disk_mb)
        return process

    async def fill_up(self) -> None:
        """End everything in it because it holds more than its limit of disk space."""
        await asyncio.gather(*(process.kill("disk") for process in self._processes))

    async def destroy(self) -> None:
        await self._end(remove=True)

    async def detach(self) -> None:
        await self._end(remove=False)

    async def _end(self, *, remove: bool) -> None:
        if self._destruction is None or (self._destruction.done() and self._destruction.exception()):
            self._destruction = asyncio.create_task(self._free(remove=remove), name=f"free {self.id}")
        await asyncio.shield(self._destruction)

    async def _free(self, *, remove: bool) -> None:
        self._disk.remove(self)
        while self._processes or self._starting:
            processes, self._processes = self._processes, set()
            await asyncio.gather(*(process.kill() for process in processes), *self._starting)
        if self._group is not None:
            await self._group.remove()
        if remove:
            await self._folder.remove()
        else:
            self._folder.close()

    async def _start(
        self,
        command: list[str],
        scene: Scene,
        stdin: bool,
        on_listener: ListenerHandler | None,
        max_output: int | None,
        seconds: float | None,
    ) -> BubblewrapProcess:
        info, info_writer = os.pipe()
        channel: socket.socket | None = None
        process: BubblewrapProcess | None = None
        try:
            with Handed() as handed:
                handed.add(info_writer)
                if on_listener is not None:
                    channel, inside = socket.socketpair()
                    command, needed = door_command(command, handed.add(inside.detach()))
                    door = await asyncio.to_thread(SOURCE.read_bytes)
                    scene = replace(scene, mounts=(*scene.mounts, *needed), door=door)
                line = command_line(
                    self._host, self._folder, self._group, scene, command, handed, info_writer
                )
                process = await start(
                    line,
                    handed,
                    info,
                    stdin=stdin,
                    oom_kills=self._oom_kills,
                    max_output=max_output,
                    seconds=seconds,
                )
                self._processes = {process, *(other for other in self._processes if not other.closed)}
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
