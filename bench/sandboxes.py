"""What sandboxes cost: `uv run --no-sync python -m bench.sandboxes [--count N] [--crowd N] [--megabytes N]`.

Each provider that this machine has is measured in the same run: how long one takes to make, to run `true` in and to
remove; how soon a command with a way out begins; what many at once cost in memory; how fast bytes come in through the
gateway. The baselines, a bare `true` and the same bytes without sandbox and gateway, are taken in between.
`TASKYARD_SANDBOX__…` names another provider and its engine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from taskyard.gateway.hosts import HostRules
from taskyard.gateway.server import Gateway, Network, Policy
from taskyard.sandbox.provider import Limits, Process, Provider, Sandbox, Spec
from taskyard.sandbox.providers import provider_for
from taskyard.settings import Settings

LIMITS = Limits(cpus=2, memory_mb=1024, pids=200, tmp_mb=64)
FETCH = """
import socket, sys
host, port, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = socket.create_connection(("127.0.0.1", 3128) if host == "gateway" else (host, port))
if host == "gateway":
    s.sendall(b"CONNECT localhost:%d HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" % port)
    assert b" 200 " in s.recv(65536)
s.sendall(b"%d\\n" % megabytes)
left = megabytes << 20
while left:
    data = s.recv(1 << 18)
    assert data
    left -= len(data)
"""


def gateway() -> Gateway:
    network = Network("full", internal=HostRules(["localhost"], None))
    return Gateway(Policy("bench", {}, network), on_refusal=print, on_usage=lambda _: None)


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    await work()
    return (time.perf_counter() - begun) * 1000


async def bare() -> None:
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()


async def whole(provider: Provider, number: int) -> tuple[float, float, float]:
    """Milliseconds to make one, to run `true` in it, and to remove it."""
    made: list[Sandbox] = []

    async def make() -> None:
        made.append(await provider.create(Spec(f"bench-{os.getpid()}-{number}", LIMITS)))

    async def run() -> None:
        process = await made[0].exec(["true"])
        assert (await process.wait()).code == 0

    return await timed(make), await timed(run), await timed(made[0].destroy)


async def opened(sandbox: Sandbox) -> float:
    """Milliseconds until a command that has a way out says its first word."""
    door = gateway()
    process: list[Process] = []

    async def start() -> None:
        process.append(await sandbox.exec(["echo", "here"], on_listener=door.serve))
        assert await process[0].stdout.readline() == b"here\n"

    took = await timed(start)
    await process[0].kill()
    await door.close()
    return took


def memory(pids: set[int]) -> float:
    """Megabytes of these processes; what several share is counted once."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def processes() -> set[int]:
    return {int(path.name) for path in Path("/proc").glob("[0-9]*")}


async def crowd(provider: Provider, count: int) -> tuple[float, float]:
    """Of so many sandboxes with a sleeping program: megabytes for each, of the server's and of all others."""
    own = memory({os.getpid()})
    before = processes()
    sandboxes: list[Sandbox] = []
    for number in range(count):
        sandbox = await provider.create(Spec(f"crowd-{os.getpid()}-{number}", LIMITS))
        sandboxes.append(sandbox)
        await sandbox.exec(["sleep", "600"])
    await asyncio.sleep(1)
    others = memory(processes() - before)
    ours = memory({os.getpid()}) - own
    for sandbox in sandboxes:
        await sandbox.destroy()
    return ours / count, others / count


async def serve_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    piece = bytes(1 << 18)
    for _ in range(int(await reader.readline()) * 4):
        writer.write(piece)
        await writer.drain()
    writer.close()


async def throughput(sandbox: Sandbox, port: int, megabytes: int) -> tuple[float, float]:
    """Megabytes a second through the gateway, and the seconds of CPU that this process took for a gigabyte.

    The server of the bytes is this process, too: the same without sandbox is what has to be taken off.
    """
    door = gateway()
    begun, cpu = time.perf_counter(), _cpu()
    process = await sandbox.exec(
        ["python3", "-c", FETCH, "gateway", str(port), str(megabytes)], on_listener=door.serve
    )
    end = await process.wait()
    assert end.code == 0, end.stderr_tail
    took, used = time.perf_counter() - begun, _cpu() - cpu
    await process.kill()
    await door.close()
    return megabytes / took, used / megabytes * 1024


async def direct(port: int, megabytes: int) -> tuple[float, float]:
    begun, cpu = time.perf_counter(), _cpu()
    process = await asyncio.create_subprocess_exec(
        "python3", "-c", FETCH, "127.0.0.1", str(port), str(megabytes)
    )
    assert await process.wait() == 0
    return megabytes / (time.perf_counter() - begun), (_cpu() - cpu) / megabytes * 1024


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def row(name: str, values: list[float]) -> None:
    ordered = sorted(values)
    print(f"{name:<44} {statistics.median(ordered):>9.1f} {ordered[0]:>9.1f} {ordered[-1]:>9.1f}", flush=True)


async def measure(count: int, size: int, megabytes: int) -> None:
    server = await asyncio.start_server(serve_bytes, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        provider = provider_for(Settings(data_dir=Path(folder)))
        try:
            print(f"{provider.name:<44} {'median ms':>9} {'least':>9} {'most':>9}")
            bases, parts, doors = [], [], []
            sandbox = await provider.create(Spec(f"bench-{os.getpid()}", LIMITS))
            for number in range(count):
                bases.append(await timed(bare))
                parts.append(await whole(provider, number))
                doors.append(await opened(sandbox))
            row("a bare `true` (baseline)", bases)
            for index, name in enumerate(("make", "run `true`", "remove")):
                row(name, [part[index] for part in parts])
            row("all three", [sum(part) for part in parts])
            row("command with a way out, to its first word", doors)
            fast, least = await direct(port, megabytes)
            through, cost = await throughput(sandbox, port, megabytes)
            print(f"\n{megabytes} MB from a server of this machine  MB/s  server CPU s/GB")
            print(f"  direct (baseline)                  {fast:>6.0f}  {least:.2f}")
            print(f"  into a sandbox, by its gateway     {through:>6.0f}  {cost:.2f}")
            await sandbox.destroy()
            ours, others = await crowd(provider, size)
            print(f"\n{size} sandboxes at once: {others:.2f} MB each, and {ours:.2f} MB in the server (PSS)")
        finally:
            await provider.close()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--crowd", type=int, default=100)
    parser.add_argument("--megabytes", type=int, default=500)
    options = parser.parse_args()
    uvloop.run(measure(options.count, options.crowd, options.megabytes))


if __name__ == "__main__":
    main()
