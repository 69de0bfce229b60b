"""What the gateway costs: `uv run --no-sync python -m bench.gateway`.

A model server, a gateway and the client are a process each, as in real life. Calls go directly and through the
gateway in turn, so that both see the same machine; what the gateway adds is the difference of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process

import uvloop

from taskyard.gateway.hosts import HostRules
from taskyard.gateway.server import Budget, Gateway, ModelRoute, Network, Policy

MEGABYTE = b"x" * (1 << 20)


async def model_server(count: int, pause: float) -> None:
    """Answers a POST with a short stream of events, `pause` ms apart, and `GET /N` with N megabytes."""
    usage = {"input_tokens": 1000, "output_tokens": 1, "cache_read_input_tokens": 50_000}
    start = {"type": "message_start", "message": {"model": "claude-sonnet-4-5", "usage": usage}}
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word "}}
    end = {"type": "message_delta", "usage": {"output_tokens": count}}
    events = [f"data: {json.dumps(event)}\n\n".encode() for event in (start, *[delta] * count, end)]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                if request.startswith(b"GET"):
                    for _ in range(int(request.split()[1][1:])):
                        writer.write(MEGABYTE)
                        await writer.drain()
                    writer.close()
                    return
                length = int(request.lower().partition(b"content-length:")[2].split()[0])
                await reader.readexactly(length)
                writer.write(head)
                for event in events:
                    writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                    if pause:
                        await asyncio.sleep(pause / 1000)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    await _announce(await asyncio.start_server(serve, "127.0.0.1", 0))


async def gateway_server(upstream: int, *, limited: bool) -> None:
    route = ModelRoute(f"http://127.0.0.1:{upstream}", "sk-bench")
    network = Network("full", internal=HostRules(["localhost"], None))
    limits = {"budget": Budget(cost=1e9), "allowed_models": [["claude-*"]]} if limited else {}
    policy = Policy("bench", {"anthropic": route, "openai": route}, network, **limits)  # type: ignore[arg-type]
    gateway = Gateway(
        policy, on_refusal=lambda refusal: print(refusal, file=sys.stderr), on_usage=lambda _: None
    )
    listener = socket.create_server(("127.0.0.1", 0))
    await gateway.serve(listener)
    print(listener.getsockname()[1], flush=True)
    await asyncio.Event().wait()


async def _announce(server: asyncio.Server) -> None:
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def started(*arguments: str) -> tuple[Process, int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.gateway", *arguments, stdout=PIPE
    )
    assert process.stdout is not None
    return process, int(await process.stdout.readline())


class Caller:
    """A connection that makes the same call again and again."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str, body: bytes
    ) -> None:
        self._reader, self._writer = reader, writer
        head = f"POST {target} HTTP/1.1\r\nHost: x\r\nx-api-key: dummy\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    @classmethod
    async def to(cls, port: int, target: str, body: bytes) -> Caller:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(reader, writer, target, body)

    async def call(self) -> tuple[float, float]:
        """Milliseconds to the first event and to the end."""
        begun = time.perf_counter()
        self._writer.write(self._request)
        await self._reader.readuntil(b"message_start")
        first = time.perf_counter() - begun
        await self._reader.readuntil(b"0\r\n\r\n")
        return first * 1000, (time.perf_counter() - begun) * 1000


async def calls(direct: int, plain: int, limited: int, count: int) -> None:
    columns = (("first ms", 9), ("end ms", 9), ("+first", 8), ("+end", 8), ("p95 end", 8), ("+p95", 8))
    print(f"{'one model call':<38} " + " ".join(f"{name:>{width}}" for name, width in columns))
    for size in (2_000, 200_000, 1_000_000):
        text = "word " * (size // 5)
        body = json.dumps(
            {"model": "claude-sonnet-4-5", "stream": True, "messages": [{"role": "user", "content": text}]},
            separators=(",", ":"),
        ).encode()
        callers = {
            "direct": await Caller.to(direct, "/v1/messages", body),
            "gateway": await Caller.to(plain, "/anthropic/v1/messages", body),
            "gateway, model and budget checked": await Caller.to(limited, "/anthropic/v1/messages", body),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in callers}
        for number in range(count + 20):
            for name, caller in callers.items():
                took = await caller.call()
                if number >= 20:
                    times[name].append(took)
        base = [statistics.median(column) for column in zip(*times["direct"], strict=True)]
        base_p95 = p95_of(times["direct"])
        for name, taken in times.items():
            first, end = (statistics.median(column) for column in zip(*taken, strict=True))
            p95 = p95_of(taken)
            label = f"{size // 1000} kB, {name}"
            print(
                f"{label:<38} {first:9.2f} {end:9.2f} {first - base[0]:8.2f} {end - base[1]:8.2f}"
                f" {p95:8.2f} {p95 - base_p95:8.2f}"
            )


def p95_of(taken: list[tuple[float, float]]) -> float:
    return sorted(took[1] for took in taken)[int(len(taken) * 0.95)]


async def throughput(direct: int, gateway: int, megabytes: int) -> None:
    for name, port, hello in (
        ("direct", direct, b""),
        ("tunnel", gateway, f"CONNECT localhost:{direct} HTTP/1.1\r\nHost: x\r\n\r\n".encode()),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        if hello:
            writer.write(hello)
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        begun, size = time.perf_counter(), 0
        writer.write(f"GET /{megabytes} HTTP/1.1\r\n\r\n".encode())
        while data := await reader.read(1 << 20):
            size += len(data)
        assert size == megabytes << 20, size
        print(f"egress, {name:<30} {megabytes / (time.perf_counter() - begun):9.0f} MB/s")
        writer.close()


async def main(args: argparse.Namespace) -> None:
    processes: list[Process] = []

    async def start(*arguments: str) -> int:
        process, port = await started(*arguments)
        processes.append(process)
        return port

    try:
        model = await start("--model", "--events", str(args.events), "--pause", str(args.pause))
        plain = await start("--gateway", str(model))
        limited = await start("--gateway", "--limited", str(model))
        await calls(model, plain, limited, args.calls)
        await throughput(model, plain, args.megabytes)
    finally:
        for process in processes:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upstream", nargs="?", type=int, default=0)
    parser.add_argument("--model", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gateway", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limited", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--events", type=int, default=40, help="pieces of each answer")
    parser.add_argument("--pause", type=float, default=5, help="ms between two of them")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=2000)
    args = parser.parse_args()
    if args.model:
        uvloop.run(model_server(args.events, args.pause))
    elif args.gateway:
        uvloop.run(gateway_server(args.upstream, limited=args.limited))
    else:
        uvloop.run(main(args))
