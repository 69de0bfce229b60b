"""Real sandboxes for tests: a provider on a folder of its own, and short ways to run commands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from taskyard.sandbox.bubblewrap import BubblewrapProvider, BubblewrapSandbox
from taskyard.sandbox.docker import DockerProvider
from taskyard.sandbox.provider import Exit, Limits, ListenerHandler, Mount, Process, Provider, Sandbox, Spec
from taskyard.settings import Settings
from tests.support.docker import docker_settings

KINDS = ("bubblewrap", "docker", "kubernetes")
"""The providers that the contract is tried on."""

LIMITS = Limits(cpus=1, memory_mb=512, pids=128, tmp_mb=64)


@dataclass
class Done:
    """A command that has ended."""

    output: str
    end: Exit

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


class AnyHut:
    """A provider, and the sandboxes that a test makes with it."""

    limits_memory = True
    """False where a stand-in of an engine does not do what its provider relies on."""

    def __init__(self, folder: Path, provider: Provider) -> None:
        self.folder = folder
        self.provider = provider
        self.made: list[Sandbox] = []

    async def sandbox(
        self, name: str = "one", limits: Limits = LIMITS, mounts: tuple[Mount, ...] = ()
    ) -> Sandbox:
        sandbox = await self.provider.create(Spec(name, limits, mounts))
        self.made.append(sandbox)
        return sandbox

    async def close(self) -> None:
        for sandbox in self.made:
            await sandbox.destroy()
        await self.provider.close()


class Hut(AnyHut):
    """The same with bubblewrap."""

    provider: BubblewrapProvider

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        super().__init__(folder, BubblewrapProvider(Settings(_env_file=None, data_dir=folder)))

    async def sandbox(
        self, name: str = "one", limits: Limits = LIMITS, mounts: tuple[Mount, ...] = ()
    ) -> BubblewrapSandbox:
        sandbox = await super().sandbox(name, limits, mounts)
        assert isinstance(sandbox, BubblewrapSandbox)
        return sandbox


def docker_hut(folder: Path, host: str, **docker: object) -> AnyHut:
    """The same on a container engine; docker: further settings of it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    sandbox = docker_settings(host, **docker)
    return AnyHut(folder, DockerProvider(Settings(_env_file=None, data_dir=folder, sandbox=sandbox)))


@asynccontextmanager
async def open_hut(kind: str, folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[AnyHut]:
    """A provider of a kind, with its data in a folder. request: for what the provider needs to be there."""
    hut: AnyHut
    match kind:
        case "bubblewrap":
            hut = Hut(folder)
        case "docker":
            hut = docker_hut(folder, request.getfixturevalue("docker_host"))
        case "kubernetes":
            from tests.support.kube_hut import open_kube_hut

            async with open_kube_hut(folder) as hut:
                yield hut
            return
        case _:
            raise ValueError(kind)
    try:
        yield hut
    finally:
        await hut.close()


async def run(
    sandbox: Sandbox,
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


async def shell(sandbox: Sandbox, script: str, env: Mapping[str, str] | None = None) -> Done:
    return await run(sandbox, "sh", "-c", script, env=env)


async def first_line(process: Process) -> str:
    """What the command says first, within a minute."""
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


BOMB = """
import os, time
print("ready", flush=True)
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.05)
"""
"""Python that says `ready` and makes all processes that it may. It stays: what cannot be forked now is tried again."""


def processes_with(word: str) -> list[int]:
    """Host processes with this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def gone(word: str) -> None:
    """Wait until no host process has this word in its command line."""
    deadline = time.monotonic() + 60
    while left := processes_with(word):
        assert time.monotonic() < deadline, f"still running: {left}"
        await asyncio.sleep(0.01)
