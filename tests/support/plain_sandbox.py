"""A stand-in for a sandbox: plain processes, no isolation at all, for tests of what runs inside one.

It stands in for `taskyard.sandbox.provider.Sandbox` where the machine cannot make a real one. Paths inside
(`/tmp/workspace`, mounts) are replaced in arguments, environment and working directory by host paths.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from taskyard.sandbox.provider import Exit, ListenerHandler, Mount

_TAIL = 8192


class PlainProcess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self.pid = process.pid
        self.stdin = process.stdin
        self.stdout = process.stdout
        self._tail = b""
        self._draining = asyncio.create_task(self._drain(process.stderr))
        self._killed = False

    async def _drain(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(65536):
            self._tail = (self._tail + chunk)[-_TAIL:]

    def stderr_tail(self) -> str:
        return self._tail.decode("utf-8", "replace")

    async def wait(self) -> Exit:
        code = await self._process.wait()
        await self._draining
        return Exit(
            code if code >= 0 else 128 - code, "killed" if self._killed else "exited", self.stderr_tail()
        )

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._killed = True
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        # asyncio reports the exit only after the pipes were read to their ends.
        while await self.stdout.read(65536):
            pass
        await self.wait()

    async def terminate(self, grace_s: float) -> None:
        await self.kill()


class PlainSandbox:
    id = "plain"
    workspace = "/tmp/workspace"
    home = "/home/agent"
    host_programs = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scratch = root / "scratch"
        for name in ("workspace", "home", "scratch"):
            (root / name).mkdir(parents=True)

    def outside(self, path: str, mounts: Sequence[Mount] = ()) -> str:
        """A text in which paths inside are replaced by those of the host."""
        for mount in mounts:
            path = path.replace(mount.target, str(mount.source))
        return path.replace(self.workspace, str(self.root / "workspace"))

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
    ) -> PlainProcess:
        assert on_listener is None, "the stand-in has no network to listen in"
        process = await asyncio.create_subprocess_exec(
            *(self.outside(text, mounts) for text in argv),
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.root / "home"),
                **{name: self.outside(value, mounts) for name, value in env.items()},
            },
            cwd=self.outside(cwd or self.workspace, mounts),
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        return PlainProcess(process)

    async def detach(self) -> None:
        pass

    async def destroy(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
