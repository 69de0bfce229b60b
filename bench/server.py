"""A `taskyard serve` in a temporary folder, and what its processes have used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """A running server: its URL, first key, and the time from command to ready, in seconds."""

    url: str
    key: str
    data_dir: Path
    pid: int
    ready_s: float

    def processes(self) -> dict[str, list[int]]:
        """Process ids of the server and of its PostgreSQL."""
        postgres = []
        lines = (self.data_dir / "postgres" / "data" / "postmaster.pid").read_text().splitlines()
        postmaster = int(lines[0])
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == postmaster:
                postgres.append(int(stat.parent.name))
        return {"server": [self.pid], "postgres": [postmaster, *postgres]}

    def cpu(self) -> dict[str, float]:
        """CPU seconds used so far."""
        return {name: sum(map(_cpu, pids)) for name, pids in self.processes().items()}

    def memory_mb(self) -> dict[str, float]:
        """Proportional set size."""
        return {name: sum(map(_pss, pids)) for name, pids in self.processes().items()}


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])) / TICK


def _pss(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


@contextmanager
def running_server(kept: Path | None = None, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server on a free port, stopped at the end. Its data are in a folder of its own, or in `kept`; `settings` are
    variables of its environment."""
    with tempfile.TemporaryDirectory(prefix="taskyard-bench-") as folder:
        data_dir = kept or Path(folder) / "data"
        env = {k: v for k, v in os.environ.items() if not k.startswith("TASKYARD_")}
        env |= {"TASKYARD_DATA_DIR": str(data_dir), "TASKYARD_RATE_LIMITS__ENABLED": "false"}
        env |= settings or {}
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "taskyard.cli", "serve", "--port", "0"], env=env, stdout=subprocess.DEVNULL
        )
        try:
            state = data_dir / "server.json"
            while not state.exists():
                if process.poll() is not None or time.monotonic() - started > 60:
                    sys.exit("the server did not start; run `taskyard serve` to see why")
                time.sleep(0.01)
            found = json.loads(state.read_text())
            key = (data_dir / "first-key").read_text().strip()
            yield Server(found["url"], key, data_dir, process.pid, time.monotonic() - started)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(180)
