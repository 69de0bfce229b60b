"""Real sandboxes for tests: a provider on a folder of its own, and short ways to run commands."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taskyard.sandbox.bubblewrap import BubblewrapProvider, BubblewrapSandbox
from taskyard.sandbox.provider import Exit, Limits, ListenerHandler, Mount, Process, Spec
from taskyard.settings import Settings

LIMITS = Limits(cpus=1, memory_mb=512, pids=128, tmp_mb=64)


@dataclass
class Done:
    """A command that has ended."""

    output: str
    end: Exit

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


class Hut:
    """A provider, and the sandboxes that a test makes with it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.folder = folder
        self.provider = BubblewrapProvider(Settings(_env_file=None, data_dir=folder))
        self.made: list[BubblewrapSandbox] = []

    async def sandbox(
        self, name: str = "one", limits: Limits = LIMITS, mounts: tuple[Mount, ...] = ()
    ) -> BubblewrapSandbox:
        sandbox = await self.provider.create(Spec(name, limits, mounts))
        self.made.append(sandbox)
        return sandbox

    async def close(self) -> None:
        for sandbox in self.made:
            await sandbox.destroy()


async def run(
    sandbox: BubblewrapSandbox,
    *argv: str,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    mounts: Sequence[Mount] = (),
    on_listener: ListenerHandler | None = None,
) -> Done:
    """Run a command to its end, within a minute."""
    async with asyncio.timeout(60):
        process = await sandbox.exec(argv, env=env or {}, cwd=cwd, mounts=mounts, on_listener=on_listener)
        try:
            output = await process.stdout.read()
            return Done(output.decode(), await process.wait())
        finally:
            await process.kill()


async def shell(sandbox: BubblewrapSandbox, script: str, env: Mapping[str, str] | None = None) -> Done:
    return await run(sandbox, "sh", "-c", script, env=env)


async def first_line(process: Process) -> str:
    """What the command says first, within a minute."""
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()
