"""Run all benchmarks and print one table: `scripts/bench`. `--json FILE` also writes the numbers."""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.server import Server, running_server

Json = dict[str, Any]


@dataclass
class Figure:
    name: str
    count: int
    server_ms: float
    """CPU of the server process for one operation."""
    postgres_ms: float
    p50_ms: float
    p95_ms: float
    per_s: float


class Bench:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.figures: list[Figure] = []
        self.client = httpx.AsyncClient(
            base_url=f"{server.url}/api/projects/@current/",
            headers={"Authorization": f"Bearer {server.key}"},
            timeout=60,
            trust_env=False,
            limits=httpx.Limits(max_connections=32),
        )

    async def measure(
        self, name: str, count: int, operation: Callable[[int], Awaitable[float | None]], *, at_once: int = 1
    ) -> None:
        """Do an operation `count` times, `at_once` at a time. It may return its own latency in seconds."""
        times: list[float] = []
        numbers = iter(range(count))

        async def lane() -> None:
            for number in numbers:
                started = time.perf_counter()
                own = await operation(number)
                times.append(time.perf_counter() - started if own is None else own)

        before, started = self.server.cpu(), time.perf_counter()
        await asyncio.gather(*(lane() for _ in range(at_once)))
        wall, after = time.perf_counter() - started, self.server.cpu()
        ms = {name: (after[name] - before[name]) * 1000 / count for name in after}
        times.sort()
        figure = Figure(
            name, count, ms["server"], ms["postgres"],
            statistics.median(times) * 1000, times[int(len(times) * 0.95)] * 1000, count / wall,
        )  # fmt: skip
        self.figures.append(figure)
        print(
            f"{figure.name:<44} {figure.server_ms:8.2f} {figure.postgres_ms:8.2f}"
            f" {figure.p50_ms:9.1f} {figure.p95_ms:9.1f} {figure.per_s:9.1f}",
            flush=True,
        )

    async def call(self, method: str, path: str, **options: Any) -> Json:
        response = await self.client.request(method, path, **options)
        response.raise_for_status()
        return dict(response.json())

    async def run(self) -> None:
        print(f"{'operation':<44} {'CPU ms':>8} {'PG ms':>8} {'p50 ms':>9} {'p95 ms':>9} {'per s':>9}")
        task = {
            "title": "Bench",
            "description": "Fix the flaky test\nin the importer.",
            "repository": "acme/shop",
        }
        ids: list[str] = []

        async def create(_: int) -> None:
            ids.append((await self.call("POST", "tasks/", json=task))["id"])

        async def get(number: int) -> None:
            await self.call("GET", f"tasks/{ids[number % len(ids)]}/")

        async def list_100(_: int) -> None:
            assert len((await self.call("GET", "tasks/?limit=100"))["results"]) == 100

        async def health(_: int) -> None:
            (await self.client.get(f"{self.server.url}/health")).raise_for_status()

        await self.measure("health (baseline of HTTP)", 2000, health)
        await self.measure("create task", 1000, create)
        await self.measure("create task, 8 connections", 2000, create, at_once=8)
        await self.measure("get task", 2000, get)
        await self.measure("get task, 8 connections", 3000, get, at_once=8)
        await self.measure("list 100 tasks", 200, list_100)
        await self.measure("append 100 log entries", 200, await self.appending())
        await self.measure("change -> subscriber", 200, await self.subscribed())
        await self.call("PATCH", self._subscribed, json={"status": "cancelled"})
        await self._reader
        await self.measure("create + start run -> first agent event", 20, self.first_event)
        await self.measure("runs to completion, 8 at once", 40, self.completed_run, at_once=8)
        await self.client.aclose()

    async def appending(self) -> Callable[[int], Awaitable[None]]:
        """Appends to the log of a run that is driven from outside, 100 entries of some 300 bytes each."""
        task = await self.call("POST", "tasks/", json={"title": "Outside"})
        run = await self.call("POST", f"tasks/{task['id']}/runs/", json={"environment": "local"})
        update = {"sessionUpdate": "agent_message", "content": {"type": "text", "text": "words " * 20}}
        note = {"jsonrpc": "2.0", "method": "session/update", "params": {"sessionId": "s", "update": update}}
        entry = {"type": "notification", "timestamp": "2026-01-01T00:00:00.000Z", "notification": note}
        body = {"entries": [entry] * 100}

        async def append(_: int) -> None:
            await self.call("POST", f"tasks/{task['id']}/runs/{run['id']}/append_log/", json=body)

        return append

    async def start(self, script: str) -> tuple[str, str]:
        task = await self.call("POST", "tasks/", json={"description": script})
        started = await self.call("POST", f"tasks/{task['id']}/run/", json={"agent": "scripted"})
        return task["id"], started["latest_run"]["id"]

    async def subscribed(self) -> Callable[[int], Awaitable[float]]:
        """PATCH a queued run; the time until its event reaches an open stream."""
        task = await self.call("POST", "tasks/", json={})
        run = (await self.call("POST", f"tasks/{task['id']}/run/", json={"agent": "scripted"}))["latest_run"]
        path = f"tasks/{task['id']}/runs/{run['id']}/"
        arrived: asyncio.Queue[float] = asyncio.Queue()
        connected = asyncio.Event()

        async def read() -> None:
            async with self.client.stream("GET", f"{path}stream/") as response:
                connected.set()
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and '"error_message": "bench' in line:
                        arrived.put_nowait(time.perf_counter())

        self._subscribed, self._reader = path, asyncio.create_task(read())
        await connected.wait()

        async def change(number: int) -> float:
            started = time.perf_counter()
            await self.call("PATCH", path, json={"error_message": f"bench {number}"})
            return await arrived.get() - started

        return change

    async def first_event(self, _: int) -> float:
        started = time.perf_counter()
        task, run = await self.start("SAY hello")
        async with self.client.stream("GET", f"tasks/{task}/runs/{run}/stream/") as response:
            async for line in response.aiter_lines():
                if "agent_message_chunk" in line:
                    return time.perf_counter() - started
        raise AssertionError("the stream ended without a word of the agent")

    async def completed_run(self, _: int) -> None:
        task, run = await self.start("SAY hello")
        async with self.client.stream("GET", f"tasks/{task}/runs/{run}/stream/") as response:
            async for _line in response.aiter_lines():
                pass
        body = await self.call("GET", f"tasks/{task}/runs/{run}/")
        assert body["status"] == "completed", body


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with running_server() as server:
        memory = server.memory_mb()
        print(f"{platform.machine()}, Python {platform.python_version()}")
        print(f"ready after {server.ready_s:.2f} s (first start, database made)")
        print("at rest: " + ", ".join(f"{name} {mb:.0f} MB" for name, mb in memory.items()) + " (PSS)")
        bench = Bench(server)
        asyncio.run(bench.run())
        after = server.memory_mb()
        print("after: " + ", ".join(f"{name} {mb:.0f} MB" for name, mb in after.items()) + " (PSS)")
        if args.json:
            result = {"ready_s": server.ready_s, "memory_mb": memory, "after_mb": after}
            args.json.write_text(
                json.dumps(result | {"figures": [asdict(f) for f in bench.figures]}, indent=1)
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
