"""`taskyard serve` as a process of its own, as a person starts it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

DEADLINE_S = 60.0


def environment(data_dir: Path, **extra: str) -> dict[str, str]:
    """The environment of a command: nothing of the tests' own but the path."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "SSL_CERT_FILE") if name in os.environ}
    return {**kept, "HOME": str(data_dir.parent), "TASKYARD_DATA_DIR": str(data_dir), **extra}


def taskyard(data_dir: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "taskyard.cli", *words],
        env=environment(data_dir, **extra),
        cwd=data_dir.parent,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S * 2,
        check=False,
    )


class Site:
    """A running `taskyard serve` or `taskyard api`."""

    def __init__(self, data_dir: Path, *options: str, command: str = "serve", **extra: str) -> None:
        self.data_dir = data_dir
        self.output = data_dir.parent / f"serve-{time.monotonic_ns()}.log"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "taskyard.cli", command, "--port", "0", *options],
                env=environment(data_dir, **extra),
                cwd=data_dir.parent,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.url = self._wait_ready()

    def _wait_ready(self) -> str:
        state, end = self.data_dir / "server.json", time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended: {self.said()}"
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(state.read_text())
                if found["pid"] == self.process.pid:
                    return str(found["url"])
            time.sleep(0.05)
        raise AssertionError(f"not ready after {DEADLINE_S} s: {self.said()}")

    @property
    def key(self) -> str:
        return (self.data_dir / "first-key").read_text().strip()

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        url = f"{self.url}/api/projects/@current/{path}" if not path.startswith("/") else self.url + path
        return httpx.request(method, url, headers=headers, timeout=DEADLINE_S, trust_env=False, **options)

    def wait(self, path: str, **fields: Any) -> dict[str, Any]:
        """Poll a resource until it has these fields."""
        found: dict[str, Any] = until(
            lambda: self.call("GET", path).json(),
            lambda body: all(body.get(name) == value for name, value in fields.items()),
            lambda body: f"{fields}: {body}",
        )
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


def until(probe: Callable[[], Any], good: Callable[[Any], bool], message: Callable[[Any], str]) -> Any:
    """Call the probe until its value is good, for at most DEADLINE_S seconds."""
    end = time.monotonic() + DEADLINE_S
    while not good(value := probe()):
        assert time.monotonic() < end, f"after {DEADLINE_S} s no {message(value)}"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def running_site(data_dir: Path, *, command: str = "serve", **extra: str) -> Iterator[Site]:
    site = Site(data_dir, command=command, **extra)
    try:
        yield site
    finally:
        site.stop()


@contextlib.contextmanager
def running_worker_process(data_dir: Path, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `taskyard worker`; whether it is ready shows in what it does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "taskyard.cli", "worker"],
        env=environment(data_dir, **extra),
        cwd=data_dir.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def postgres_of(data_dir: Path) -> list[int]:
    """Processes of the embedded PostgreSQL of a data folder."""
    try:
        pid = int((data_dir / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return []
    return [pid] if Path(f"/proc/{pid}").exists() else []
