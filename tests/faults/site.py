"""The site that the storm goes over: PostgreSQL, an API, workers on two data folders; what ends is started again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from taskyard.db.embedded import EmbeddedPostgres
from taskyard.sandbox import strays
from tests.support.site import environment, postgres_of

AGENT = Path(__file__).parents[1] / "support" / "stepping_agent.py"
LEASE_S = 8
DISK_MB = 400
SETTINGS = {
    "TASKYARD_AGENTS__CLAUDE__COMMAND": json.dumps(["/usr/bin/python3", "-I", str(AGENT)]),
    "TASKYARD_RATE_LIMITS__ENABLED": "false",
    "TASKYARD_RUNS__MAX_ATTEMPTS": "1000",  # a storm can hit a run any number of times
    "TASKYARD_RUNS__CHECKPOINT_S": "2",
    "TASKYARD_RUNS__SUSPEND_AFTER_S": "4",
    "TASKYARD_RUNS__AGENT_SILENCE_S": "180",
    "TASKYARD_WORKER__CONCURRENCY": "6",
    "TASKYARD_WORKER__DRAIN_S": "2",
    "TASKYARD_WORKER__MIN_FREE_MB": "20",  # of the small disk of the storm
    "TASKYARD_SANDBOX__MEMORY_MB": "256",
    "TASKYARD_SECRET_KEYS": json.dumps(["dGFza3lhcmQtZmF1bHRzLXRhc2t5YXJkLWZhdWx0cy4="]),
    "FAULTS_LEASE_S": str(LEASE_S),
}


class Part:
    """One process, started again whenever it has ended, as a service manager does."""

    def __init__(self, name: str, words: list[str], data_dir: Path, env: dict[str, str], log: Path) -> None:
        self.name = name
        self.data_dir = data_dir
        self._words, self._env, self._log = words, env, log
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def _keep(self) -> None:
        while True:
            if self.process is None or self.process.poll() is not None:
                if self.process is not None:
                    await asyncio.sleep(0.5)
                with self._log.open("ab") as output:
                    self.process = subprocess.Popen(
                        [sys.executable, "-m", "tests.faults.process", *self._words],
                        env=environment(self.data_dir, **self._env), cwd=Path(__file__).parents[2],
                        stdout=output, stderr=subprocess.STDOUT,
                    )  # fmt: skip
                self.starts += 1
            await asyncio.sleep(0.1)

    def send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """End it for good; its exit code."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        if self.process is None:
            return 0
        self.send(signal.SIGCONT)
        self.send(number)
        return await asyncio.to_thread(self.process.wait, 120)


class Postgres:
    """A server of the site's own. One that died is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        # What was committed has to survive the death of the process, not of the machine.
        self._server = EmbeddedPostgres(folder, settings={"fsync": "off", "full_page_writes": "off"})
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.url = await self._server.start()
        self._keeper = asyncio.create_task(self._server.keep(), name="keep postgres")

    def pids(self) -> list[int]:
        return postgres_of(self.folder)

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        await self._server.stop()


class Site:
    """data folders `a` (on a small disk of its own, where this may mount one) and `b`, as of two machines."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder = folder
        self.postgres = Postgres(folder / "p")
        self.data_dirs = [folder / "a", folder / "b"]
        self.disk = False
        self._workers = workers
        self.workers: list[Part] = []
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        for data_dir in self.data_dirs:
            data_dir.mkdir(mode=0o700)
        if os.geteuid() == 0:
            mount = [
                "mount",
                "-t",
                "tmpfs",
                "-o",
                f"size={DISK_MB}m,mode=700",
                "tmpfs",
                str(self.data_dirs[0]),
            ]
            self.disk = subprocess.run(mount, check=False).returncode == 0
        # Both machines share the uploaded files; the site has no bucket.
        (self.data_dirs[0] / "objects").mkdir()
        (self.data_dirs[1] / "objects").symlink_to(self.data_dirs[0] / "objects")
        await self.postgres.start()
        env = {**SETTINGS, "TASKYARD_DATABASE_URL": self.postgres.url}
        words = ["api", "--port", str(self.port)]
        self.api = Part("api", words, self.data_dirs[0], env, self.folder / "api.log")
        for number in range(self._workers):
            name = f"worker{number}"
            data_dir = self.data_dirs[1 if number == 2 else 0]
            log = self.folder / f"{name}.log"
            self.workers.append(Part(name, ["worker"], data_dir, env, log))
        for part in (self.api, *self.workers):
            part.start()

    @property
    def key(self) -> str:
        return (self.data_dirs[0] / "first-key").read_text().strip()

    @property
    def roots(self) -> list[Path]:
        """The folders of all sandboxes."""
        return [data_dir / "sandboxes" for data_dir in self.data_dirs]

    def in_sandboxes(self) -> list[int]:
        """Processes of sandboxes: bwrap, agents, and what those started."""
        return [stray.pid for root in self.roots for stray in strays.find(root)]

    async def stop(self) -> None:
        try:
            await asyncio.gather(*(part.stop() for part in (self.api, *self.workers)))
            await self.postgres.stop()
        finally:
            if self.disk:
                subprocess.run(["umount", "--lazy", str(self.data_dirs[0])], check=True)
                self.disk = False


def _free_port() -> int:
    """A free port below those that the system hands out: nobody else takes it while the API is away."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as taken:
            try:
                taken.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
