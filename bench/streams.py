"""Streams with many subscribers: `python -m bench.streams`.

Starts PostgreSQL and some `taskyard api` processes, opens streams over HTTP on loopback, appends events straight to
the record, and prints how long each took from before its append to every subscriber (p50, p95), what the API
processes used for one delivery, and what a subscriber costs in memory and descriptors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
import uvloop

from bench.server import _cpu, _pss
from taskyard.accounts import admin
from taskyard.db.engine import Database, open_database
from taskyard.events import store
from taskyard.events.entries import Entry
from taskyard.settings import Settings

PADDING = "x" * 200
"""An event is about as long as a chunk of an agent's message: 300 bytes."""
BIG = json.dumps({"type": "notification", "text": "y" * 64_000})


@dataclass
class Api:
    """One API process."""

    url: str
    pid: int

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@dataclass
class Site:
    database: Database
    apis: list[Api]
    key: str
    task: str
    runs: list[str] = field(default_factory=list)

    def cpu(self) -> float:
        return sum(_cpu(api.pid) for api in self.apis)

    def memory_mb(self) -> float:
        return sum(_pss(api.pid) for api in self.apis)

    async def more_runs(self, count: int) -> list[str]:
        """Runs that nobody drives."""
        path = f"/api/projects/@current/tasks/{self.task}/runs/"
        headers = {"Authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(base_url=self.apis[0].url, headers=headers, trust_env=False) as client:
            made = []
            for _ in range(count):
                response = await client.post(path, json={}, timeout=60)
                response.raise_for_status()
                made.append(response.json()["id"])
        return made


class Subscriber(asyncio.Protocol):
    """A stream of a run, read as cheaply as can be: the time at which each marked event came."""

    def __init__(self, site: Site, run: str, arrived: list[tuple[int, float]], *, reads: bool = True) -> None:
        self._request = (
            f"GET /api/projects/@current/tasks/{site.task}/runs/{run}/stream/ HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {site.key}\r\nAccept: text/event-stream\r\n\r\n"
        ).encode()
        self._arrived = arrived
        self._reads = reads
        self._rest = b""
        self.connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit from it
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.connected.done():
            assert data.startswith(b"HTTP/1.1 200"), data
            self.connected.set_result(None)
            if not self._reads:
                self.transport.pause_reading()
                return
        at = data.find(b'"mark": ')
        while at >= 0:
            self._arrived.append((int(data[at + 8 : data.index(b",", at)]), now))
            at = data.find(b'"mark": ', at + 8)


@asynccontextmanager
async def subscribed(
    site: Site, runs: Sequence[str], arrived: list[tuple[int, float]], *, reads: bool = True
) -> AsyncIterator[list[Subscriber]]:
    """One stream for each of the runs, spread over the processes."""
    loop = asyncio.get_running_loop()
    subscribers: list[Subscriber] = []
    gate = asyncio.Semaphore(32)

    async def open_one(number: int, run: str) -> None:
        _, host, port = site.apis[number % len(site.apis)].url.replace("//", "").split(":")
        subscriber = Subscriber(site, run, arrived, reads=reads)
        async with gate:
            await loop.create_connection(lambda: subscriber, host, int(port))
            subscribers.append(subscriber)
            await asyncio.wait_for(subscriber.connected, 120)

    await asyncio.gather(*(open_one(number, run) for number, run in enumerate(runs)))
    try:
        yield subscribers
    finally:
        for subscriber in subscribers:
            subscriber.transport.abort()
        await asyncio.sleep(1)


async def measure(site: Site, name: str, runs: Sequence[str], appends: int, gap_s: float) -> dict[str, Any]:
    """Append to the runs in turn; every subscriber of that run has to get it."""
    arrived: list[tuple[int, float]] = []
    different = list(dict.fromkeys(runs))
    readers = len(runs) // len(different)
    before_mb, before_fds = site.memory_mb(), sum(api.descriptors() for api in site.apis)
    async with subscribed(site, runs, arrived):
        await asyncio.sleep(2)
        memory_kb = (site.memory_mb() - before_mb) * 1024 / len(runs)
        descriptors = (sum(api.descriptors() for api in site.apis) - before_fds) / len(runs)
        sent: list[float] = []
        times: list[float] = []
        started, cpu = time.perf_counter(), site.cpu()
        for number in range(appends):
            await asyncio.sleep(max(0.0, started + number * gap_s - time.perf_counter()))
            entry = Entry(json.dumps({"mark": number, "text": PADDING}))
            sent.append(time.perf_counter())
            async with site.database.connection() as connection:
                await store.append(connection, UUID(different[number % len(different)]), [entry])
        async with asyncio.timeout(60):
            while len(arrived) < appends * readers:
                await asyncio.sleep(0.01)
        cpu = site.cpu() - cpu
        assert len(arrived) == len(set(arrived)) == appends * readers or readers > 1
        times = sorted(at - sent[number] for number, at in arrived)
    figure = {
        "case": name,
        "processes": len(site.apis),
        "appends": appends,
        "p50_ms": statistics.median(times) * 1000,
        "p95_ms": times[int(len(times) * 0.95)] * 1000,
        "cpu_us": cpu * 1e6 / (appends * readers),
        "memory_kb": memory_kb,
        "descriptors": descriptors,
    }
    print(
        f"{name:<42} {len(site.apis):>5} {figure['p50_ms']:8.1f} {figure['p95_ms']:8.1f} {figure['cpu_us']:9.0f}"
        f" {memory_kb:9.0f} {descriptors:6.2f}",
        flush=True,
    )
    return figure


async def idle(site: Site, runs: Sequence[str], seconds: float) -> None:
    """What streams cost on which nothing happens: keepalives."""
    async with subscribed(site, runs, []):
        await asyncio.sleep(5)
        row = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        cpu, before = site.cpu(), await site.database.fetch_one(row)
        await asyncio.sleep(seconds)
        cpu, after = site.cpu() - cpu, await site.database.fetch_one(row)
        assert before is not None
        assert after is not None
        print(
            f"{len(runs)} silent streams for {seconds:.0f} s: {cpu / seconds * 100:.1f} % of a core,"
            f" {after['xact_commit'] - before['xact_commit']} transactions in the database",
            flush=True,
        )


async def slow(site: Site, readers: int, megabytes: int) -> None:
    """Readers that never read, while their run says a lot; and one that does."""
    [run] = await site.more_runs(1)
    arrived: list[tuple[int, float]] = []
    async with subscribed(site, [run] * readers, [], reads=False), subscribed(site, [run], arrived):
        before = site.memory_mb()
        for _ in range(megabytes * 4):
            async with site.database.connection() as connection:
                await store.append(connection, UUID(run), [Entry(BIG)] * 4)
        async with site.database.connection() as connection:
            await store.append(connection, UUID(run), [Entry(json.dumps({"mark": 1, "text": ""}))])
        async with asyncio.timeout(60):
            while not arrived:
                await asyncio.sleep(0.01)
        await asyncio.sleep(2)
        used = site.memory_mb() - before
        print(
            f"{readers} readers that do not read, {megabytes} MB appended: {used:.0f} MB more,"
            f" {used * 1024 / readers:.0f} kB a reader",
            flush=True,
        )


@asynccontextmanager
async def running_site(processes: int) -> AsyncIterator[Site]:
    with tempfile.TemporaryDirectory(prefix="taskyard-bench-") as folder:
        settings = Settings(_env_file=None, data_dir=Path(folder) / "data")
        async with open_database(settings, max_connections=8) as database:
            await admin.create_user(database, "bench@example.org")
            project = (await admin.create_project(database, "Bench"))["id"]
            await admin.add_member(database, "bench@example.org", project)
            key = (await admin.create_key(database, "bench@example.org", ["*"]))["key"]
            started = [await asyncio.to_thread(_start, folder, n, database.url) for n in range(processes)]
            try:
                apis = [Api(url, process.pid) for url, process in started]
                async with httpx.AsyncClient(trust_env=False) as client:
                    response = await client.post(
                        f"{apis[0].url}/api/projects/@current/tasks/",
                        json={"title": "Bench"},
                        headers={"Authorization": f"Bearer {key}"},
                    )
                    response.raise_for_status()
                yield Site(database, apis, key, response.json()["id"])
            finally:
                for _, process in started:
                    process.send_signal(signal.SIGTERM)
                for _, process in started:
                    await asyncio.to_thread(process.wait, 30)


def _start(folder: str, number: int, database_url: str) -> tuple[str, subprocess.Popen[bytes]]:
    data_dir = Path(folder) / f"api-{number}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("TASKYARD_")}
    env |= {
        "TASKYARD_DATA_DIR": str(data_dir),
        "TASKYARD_DATABASE_URL": database_url,
        "TASKYARD_RATE_LIMITS__ENABLED": "false",
    }
    command = [sys.executable, "-m", "taskyard.cli", "api", "--port", "0"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    state = data_dir / "server.json"
    while not state.exists():
        if process.poll() is not None or time.monotonic() > end:
            sys.exit("the API did not start; run `taskyard api` to see why")
        time.sleep(0.02)
    return json.loads(state.read_text())["url"], process


async def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    async with running_site(args.processes) as site:
        print(
            f"{'case':<42} {'procs':>5} {'p50 ms':>8} {'p95 ms':>8} {'CPU us':>9} {'kB each':>9} {'fds':>6}",
            flush=True,
        )
        await measure(site, "warm-up", await site.more_runs(1) * 10, 20, 0.02)
        for count, appends, gap_s in ((1, 300, 0.02), (100, 200, 0.05), (1000, 60, 0.3)):
            [run] = await site.more_runs(1)
            figures.append(await measure(site, f"1 run, {count} subscribers", [run] * count, appends, gap_s))
        runs = await site.more_runs(args.runs)
        name = f"{args.runs} runs, 1 subscriber each, 100 events/s"
        figures.append(await measure(site, name, runs, 1000, 0.01))
        await idle(site, runs, args.idle_s)
        await slow(site, 200, 40)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.streams")
    parser.add_argument("--processes", type=int, default=1, help="API processes")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--idle-s", type=float, default=45)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(bench(args))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
