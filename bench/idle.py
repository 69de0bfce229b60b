"""Many interactive runs that wait for a message: `python -m bench.idle`.

Starts a real server, opens runs with the scripted agent until so many wait at the same time, and tells what they cost
the server's own process, and their agents. Then it waits until all of them sleep, and wakes some. Last, a worker is
killed in the middle of a turn, and another one takes over.
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
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx

from bench.server import Server, _pss, running_server
from bench.streams import Site, running_site
from tests.support import s3_keeper

Json = dict[str, Any]
AT_ONCE = 6
"""Runs that are started at the same time; the others wait for these."""
WORDS = "\n".join(f"SAY {n}\nSLEEP 0.2" for n in range(600))


@dataclass
class Client:
    http: httpx.AsyncClient

    async def call(self, method: str, path: str, body: Json | None = None) -> Json:
        response = await self.http.request(method, path, json=body)
        response.raise_for_status()
        return dict(response.json())

    async def start(self, script: str) -> str:
        """The path of a new interactive run, after its first turn."""
        task = await self.call("POST", "tasks/", {"description": script})
        body = {"agent": "scripted", "mode": "interactive"}
        started = await self.call("POST", f"tasks/{task['id']}/run/", body)
        path = f"tasks/{task['id']}/runs/{started['latest_run']['id']}/"
        await self.hear(path, "turn_complete", beginning=True)
        return path

    async def say(self, path: str, text: str) -> None:
        params = {"jsonrpc": "2.0", "id": 1, "method": "user_message", "params": {"content": text}}
        await self.call("POST", f"{path}command/", params)

    async def hear(
        self,
        path: str,
        text: str,
        *,
        beginning: bool = False,
        then: Callable[[], Awaitable[None]] | None = None,
    ) -> float:
        """The time at which the stream had a text; `then` is called as soon as the stream is open."""
        query = {} if beginning else {"start": "latest"}
        async with self.http.stream("GET", f"{path}stream/", params=query) as response:
            response.raise_for_status()
            if then is not None:
                await then()
            async for line in response.aiter_lines():
                if line.startswith("data: ") and text in line:
                    return time.perf_counter()
        raise AssertionError(f"the stream of {path} ended without {text!r}")


def client_of(url: str, key: str) -> Client:
    return Client(
        httpx.AsyncClient(
            base_url=f"{url}/api/projects/@current/",
            headers={"Authorization": f"Bearer {key}"},
            timeout=300,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )
    )


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = []
    left = [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


@dataclass
class Usage:
    server_mb: float
    postgres_mb: float
    agents_mb: float
    processes: int
    descriptors: int
    cpu: float
    """Of the server and of PostgreSQL together, in per cent of a core."""

    def __str__(self) -> str:
        return (
            f"server {self.server_mb:.0f} MB, PostgreSQL {self.postgres_mb:.0f} MB, {self.processes} other processes"
            f" {self.agents_mb:.0f} MB (PSS), {self.descriptors} descriptors, {self.cpu:.0f} % of a core"
        )


async def usage(server: Server, seconds: float = 20) -> Usage:
    """What all of it uses while nothing is asked."""
    before = sum(server.cpu().values())
    await asyncio.sleep(seconds)
    cpu = (sum(server.cpu().values()) - before) / seconds * 100
    own = {pid for pids in server.processes().values() for pid in pids}
    others = [pid for pid in descendants(server.pid) if pid not in own]
    memory = server.memory_mb()
    return Usage(
        memory["server"],
        memory["postgres"],
        sum(map(_pss, others)),
        len(others),
        len(list(Path(f"/proc/{server.pid}/fd").iterdir())),
        cpu,
    )


async def idle(args: argparse.Namespace) -> Json:
    """Live, then asleep, then woken."""
    settings = {
        "TASKYARD_WORKER__CONCURRENCY": str(args.runs),
        "TASKYARD_RUNS__SUSPEND_AFTER_S": str(args.suspend_after_s),
        "TASKYARD_RUNS__INACTIVITY_S": "36000",
    }
    with running_server(settings=settings) as server:
        client = client_of(server.url, server.key)
        # What is imported and made with the first runs is not a run's.
        for path in await many(client, 8):
            await client.call("PATCH", path, {"status": "completed"})
        await asyncio.sleep(10)
        before = await usage(server)
        print(f"no runs: {before}", flush=True)
        started = time.monotonic()
        paths = await many(client, args.runs)
        print(f"{args.runs} runs wait after {time.monotonic() - started:.0f} s", flush=True)
        live = await usage(server)
        asleep = await sleeping(client, paths)
        assert not asleep, f"{asleep} sleep already: raise --suspend-after-s"
        print(f"live: {live}", flush=True)
        each = (live.server_mb - before.server_mb) / args.runs
        print(
            f"a live run: {each:.2f} MB of the server, {live.agents_mb / args.runs:.1f} MB of agent and sandbox,"
            f" {(live.descriptors - before.descriptors) / args.runs:.1f} descriptors",
            flush=True,
        )
        while asleep < args.runs:
            await asyncio.sleep(10)
            asleep = await sleeping(client, paths)
        after = await usage(server)
        print(f"all asleep: {after}", flush=True)
        times = [await wake(client, path) for path in paths[: args.wakes]]
        print(f"wake, message -> first word: {told(times)}", flush=True)
        figures = {
            "runs": args.runs, "before": vars(before), "live": vars(live), "asleep": vars(after), "wake_s": times,
        }  # fmt: skip
        await asyncio.gather(*(client.call("PATCH", path, {"status": "cancelled"}) for path in paths))
        await client.http.aclose()
        return figures


async def many(client: Client, count: int) -> list[str]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> str:
        async with gate:
            return await client.start("SAY ready")

    return await asyncio.gather(*(one() for _ in range(count)))


async def sleeping(client: Client, paths: Iterable[str]) -> int:
    gate = asyncio.Semaphore(8)

    async def one(path: str) -> bool:
        async with gate:
            run = await client.call("GET", path)
        assert run["status"] == "in_progress", run
        return bool(run["state"].get("suspended"))

    return sum(await asyncio.gather(*(one(path) for path in paths)))


async def wake(client: Client, path: str) -> float:
    started = 0.0

    async def say() -> None:
        nonlocal started
        started = time.perf_counter()
        await client.say(path, "SAY awake")

    return await client.hear(path, "agent_message_chunk", then=say) - started


async def kills(count: int) -> list[float]:
    """Times from the SIGKILL of a worker in the middle of a turn to the next word of that turn."""
    times = []
    async with running_site(1) as site:
        with (
            tempfile.TemporaryDirectory(prefix="taskyard-bench-") as folder,
            _storage(Path(folder)) as storage,
        ):

            def worker(name: str) -> subprocess.Popen[bytes]:
                return _worker(site, Path(folder), name, storage)

            workers = {name: worker(name) for name in ("one", "two")}
            client = client_of(site.apis[0].url, site.key)
            try:
                for _ in range(count):
                    path = await client.start("SAY ready")

                    async def say(path: str = path) -> None:
                        await client.say(path, WORDS)

                    await client.hear(path, "agent_message_chunk", then=say)
                    name = await _driver(site, path)
                    workers[name].kill()
                    killed = time.perf_counter()
                    workers[name].wait()
                    await asyncio.sleep(0.3)  # what was written before is on the stream
                    times.append(await client.hear(path, "agent_message_chunk") - killed)
                    await client.call("PATCH", path, {"status": "cancelled"})
                    workers[name] = worker(name)
            finally:
                await client.http.aclose()
                for process in workers.values():
                    process.send_signal(signal.SIGTERM)
                for process in workers.values():
                    await asyncio.to_thread(process.wait, 180)
    print(f"worker killed -> the turn goes on elsewhere: {told(times)}", flush=True)
    return times


async def _driver(site: Site, path: str) -> str:
    row = await site.database.fetch_one(
        "SELECT worker FROM run_cursors WHERE run_id = %(run)s", run=path.split("/")[3]
    )
    assert row is not None
    return str(row["worker"]).partition(":")[0]


@contextmanager
def _storage(folder: Path) -> Iterator[dict[str, str]]:
    """An S3-compatible server, without which machines cannot take over from each other; the settings for it."""
    server, url = s3_keeper.start(folder / "s3")
    settings = {
        "BUCKET": "bench",
        "ENDPOINT_URL": url,
        "PATH_STYLE": "true",
        "ACCESS_KEY_ID": s3_keeper.ACCESS_KEY,
        "SECRET_ACCESS_KEY": s3_keeper.SECRET_KEY,
    }
    try:
        client: Any = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=s3_keeper.ACCESS_KEY,
            aws_secret_access_key=s3_keeper.SECRET_KEY,
        )
        client.create_bucket(Bucket="bench")
        client.close()
        yield {f"TASKYARD_OBJECTS__S3__{name}": value for name, value in settings.items()}
    finally:
        server.kill()
        server.wait()


def _worker(site: Site, folder: Path, name: str, storage: dict[str, str]) -> subprocess.Popen[bytes]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TASKYARD_")}
    env |= {
        "TASKYARD_DATA_DIR": str(folder / name),
        "TASKYARD_DATABASE_URL": site.database.url,
        "TASKYARD_WORKER__NAME": name,
        **storage,
    }
    command = [sys.executable, "-m", "taskyard.cli", "worker"]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def told(times: list[float]) -> str:
    return (
        f"median {statistics.median(times):.2f} s, {min(times):.2f} to {max(times):.2f} s, {len(times)} times"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.idle")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument(
        "--suspend-after-s", type=float, default=420, help="longer than it takes to start them all"
    )
    parser.add_argument("--wakes", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    figures: Json = asyncio.run(idle(args)) if args.runs else {}
    if args.kills:
        figures["kill_s"] = asyncio.run(kills(args.kills))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
