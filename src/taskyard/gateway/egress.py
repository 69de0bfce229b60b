"""The network as far as a run's environment allows it: tunnels (CONNECT) and plain HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import h11

from taskyard.gateway import addresses
from taskyard.gateway.addresses import RefusedAddressError, UnreachableError
from taskyard.gateway.client_hello import MAX_HELLO, BadHelloError, HelloReader
from taskyard.gateway.exchange import Answer, Exchange
from taskyard.gateway.headers import NOT_DOWN, NOT_UP, Header, framing, passed
from taskyard.gateway.hosts import Address, BadHostError, Host, parse_authority, parse_host
from taskyard.gateway.models import Refused
from taskyard.gateway.origins import Origin
from taskyard.gateway.policy import Network
from taskyard.gateway.upstream import Timeouts, UpstreamRequest, UpstreamResponse

TUNNEL_IDLE_S = 600.0
"""A tunnel without a byte in either direction for this long is closed."""
HELLO_S = 30.0
_CHUNK = 256 * 1024
_TIMEOUTS = Timeouts(connect=addresses.CONNECT_S, read=300, write=60)
# Records and messages of TLS: RFC 8446 §5.1 and §4; the server's random that asks for another hello: §4.1.3.
_HANDSHAKE, _SERVER_HELLO = b"\x16", b"\x02"
_PASSED_OVER = (20, 23)
_RANDOM = slice(11, 43)
_RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
# Fatal alert "unrecognized_name": what a TLS client shows for it says more than a connection that just ends.
_ALERT = bytes([21, 3, 3, 0, 2, 2, 112])


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Destination:
    """A host that may be connected to, at these addresses and no other."""

    host: Host
    port: int
    addresses: Sequence[Address]


class Traffic:
    """Counts a run's bytes."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.bytes = 0

    def add(self, count: int) -> None:
        self.bytes += count

    @property
    def exceeded(self) -> str | None:
        if self.limit is None or self.bytes < self.limit:
            return None
        return f"this run has moved {self.limit} bytes over the network, and may not move more (network.max_bytes)."


async def tunnel_to(network: Network, target: str, lookups: asyncio.Semaphore) -> Destination | Refused:
    """Decide about `CONNECT host:port`. lookups: a place for each name that may be looked up at once."""
    if network.level == "none":
        return _NO_NETWORK
    try:
        host, port = parse_authority(target)
    except BadHostError as error:
        return Refused(400, f"CONNECT takes host:port, and this is none: {error}.")
    return await _destination(network, host, port, lookups)


async def plain_to(
    network: Network, target: str, lookups: asyncio.Semaphore
) -> tuple[Destination, str] | Refused:
    """Decide about a request for an absolute URL; the destination and the target there."""
    if network.level == "none":
        return _NO_NETWORK
    match = re.fullmatch(r"(?i:http)://([^/?#]+)(/[^#]*|\?[^#]*)?", target)
    if match is None:
        if target.lower().startswith("https:"):
            return Refused(400, "https URLs go through a tunnel: a client has to send CONNECT.")
        return Refused(400, "the gateway takes http URLs without a fragment, or CONNECT.")
    authority, rest = match[1], match[2] or "/"
    if "@" in authority:
        return Refused(400, "user and password belong in the header Authorization, not in the URL.")
    try:
        host, port = parse_authority(authority, 80)
    except BadHostError as error:
        return Refused(400, f"the host of the URL cannot be used: {error}.")
    destination = await _destination(network, host, port, lookups)
    if isinstance(destination, Refused):
        return destination
    return destination, rest if rest.startswith("/") else f"/{rest}"


_NO_NETWORK = Refused(403, "this sandbox has no access to the network, only to its model APIs.")


async def _destination(
    network: Network, host: Host, port: int, lookups: asyncio.Semaphore
) -> Destination | Refused:
    internal = network.internal.allow(host, port)
    if network.level == "listed" and not network.rules.allow(host, port):
        rule = host.bracketed if port in (443, 80, 22) else f"{host.bracketed}:{port}"
        message = (
            f"{host.bracketed} on port {port} is not among the hosts that this run may reach. To allow it, add "
            f"'{rule}' to allowed_domains of its sandbox environment."
        )
        return Refused(403, message, rule=rule)
    if host.address is None and "." not in host.text and not internal:
        return Refused(403, f"{host.text} is no name of the public internet.")
    try:
        found = await addresses.resolve(host, port, lookups, internal=internal)
    except RefusedAddressError as error:
        return Refused(403, f"{host.bracketed} {error}.")
    except UnreachableError as error:
        return Refused(502, f"{host.bracketed} {error}.")
    return Destination(host, port, found)


# --- tunnels ---


async def open_tunnel(destination: Destination) -> Stream | Refused:
    try:
        return await addresses.connect(destination.addresses, destination.port)
    except UnreachableError as error:
        return Refused(502, f"{destination.host.bracketed} {error}.")


async def check_hellos(
    inside: Stream, outside: Stream, first: bytes, destination: Destination, traffic: Traffic
) -> tuple[bytes, str | None]:
    """Let a TLS client begin, when it wants the server that the tunnel was opened for: another one could be any site
    of the same content network. Gives what goes out next, and why it may not, if so.

    A server may ask for a second hello (RFC 8446 §4.1.4), which has a name, too.
    """
    hello, rest, problem = await _check_hello(inside[0], first, destination)
    if problem is not None or not hello:
        return rest, problem
    begun = b""
    try:
        async with asyncio.timeout(HELLO_S):
            await _pass_on(outside[1], hello, traffic)
            while len(begun) < _RANDOM.stop and (data := await outside[0].read(_CHUNK)):
                begun += data
            await _pass_on(inside[1], begun, traffic)
    except TimeoutError:
        raise ConnectionAbortedError from None
    if begun[:1] != _HANDSHAKE or begun[5:6] != _SERVER_HELLO or begun[_RANDOM] != _RETRY:
        return rest, None
    before, rest = await _to_handshake(inside[0], rest)
    if rest[:1] != _HANDSHAKE:
        return before + rest, None
    hello, rest, problem = await _check_hello(inside[0], rest, destination)
    return before + hello + rest, problem


async def _check_hello(
    reader: asyncio.StreamReader, first: bytes, destination: Destination
) -> tuple[bytes, bytes, str | None]:
    """Read until a client has said which server it wants; the hello, what came behind it, and why it may not."""
    hello, seen = HelloReader(), bytearray(first)
    try:
        async with asyncio.timeout(HELLO_S):
            name = hello.feed(first)
            while name is None:
                data = await reader.read(_CHUNK)
                seen += data
                if not data:
                    return b"", bytes(seen), None  # it has said nothing that a server would answer
                if len(seen) > 8 * MAX_HELLO:
                    return b"", b"", "its first message is too large"
                name = hello.feed(data)
        said = bytes(seen[: hello.end]), bytes(seen[hello.end :])
        # A client that connects to an address sends no name (RFC 6066 §3).
        if name == "" and destination.host.address is not None:
            return *said, None
        if name == "":
            return *said, "its TLS does not say which server it wants"
        if parse_host(name) != destination.host:
            return *said, f"its TLS asks for another server, {name[:100]}"
    except TimeoutError:
        return b"", b"", "no TLS came for 30 seconds"
    except BadHelloError as error:
        return b"", b"", f"port 443 is for TLS, and {error}"
    except BadHostError:
        return b"", b"", "its TLS asks for a server whose name is not valid"
    return *said, None


async def _to_handshake(reader: asyncio.StreamReader, data: bytes) -> tuple[bytes, bytes]:
    """What a client sends before its second hello, early data for one, and the beginning of what follows."""
    seen, at = bytearray(data), 0
    while True:
        while len(seen) < at + 5:
            data = await reader.read(_CHUNK)
            if not data:
                return bytes(seen[:at]), bytes(seen[at:])
            seen += data
        if seen[at] not in _PASSED_OVER:
            return bytes(seen[:at]), bytes(seen[at:])
        at += 5 + int.from_bytes(seen[at + 3 : at + 5], "big")
        if at > 8 * MAX_HELLO:
            raise ConnectionAbortedError


async def _pass_on(writer: asyncio.StreamWriter, data: bytes, traffic: Traffic) -> None:
    traffic.add(len(data))
    if traffic.exceeded or writer.is_closing():
        raise ConnectionAbortedError
    writer.write(data)
    await writer.drain()


async def refuse_hello(writer: asyncio.StreamWriter) -> None:
    writer.write(_ALERT)
    await writer.drain()


async def pump(
    inside: Stream,
    outside: Stream,
    first: bytes,
    traffic: Traffic,
) -> None:
    """Pass bytes on until both sides have ended, nothing moves for TUNNEL_IDLE_S, or the run's limit is reached."""
    loop = asyncio.get_running_loop()
    moved = loop.time()

    async def one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
        nonlocal moved
        while True:
            if data:
                moved = loop.time()
                await _pass_on(writer, data, traffic)
            data = await reader.read(_CHUNK)
            if not data:
                break
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()

    ways = [
        asyncio.create_task(one_way(inside[0], outside[1], first)),
        asyncio.create_task(one_way(outside[0], inside[1], b"")),
    ]
    try:
        pending = set(ways)
        while pending:
            left = moved + TUNNEL_IDLE_S - loop.time()
            if left <= 0:
                raise ConnectionAbortedError
            done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
            for way in done:
                way.result()
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


# --- plain HTTP ---


class PlainExchange(Exchange):
    """One request for an http URL."""

    def __init__(self, destination: Destination, target: str, traffic: Traffic) -> None:
        self.name = destination.host.bracketed
        self.upstream = f"{destination.host.bracketed}:{destination.port}"
        self._destination = destination
        self._target = target
        self._traffic = traffic

    async def request(self, head: h11.Request, body: AsyncIterator[bytes] | None) -> UpstreamRequest | Answer:
        # Heads carry as much as bodies do, for who wants it.
        self._count(len(self._target) + sum(len(name) + len(value) for name, value in head.headers))
        host, port = self._destination.host.bracketed, self._destination.port
        # The host of the URL, whatever the header says (RFC 9112 §3.2.2).
        shown = host if port == 80 else f"{host}:{port}"
        sent: list[Header] = [(b"host", shown.encode("ascii")), *passed(head.headers, NOT_UP)]
        if body is not None:
            sent += framing(head.headers)
        address = self._destination.addresses[0]
        return UpstreamRequest(
            head.method.decode("ascii").upper(),
            Origin("http", str(address), port),
            self._target.encode("ascii"),
            sent,
            None if body is None else self._counted(body),
            _TIMEOUTS,
        )

    async def _counted(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in body:
            self._count(len(chunk))
            yield chunk

    def head(self, answer: UpstreamResponse) -> list[Header] | Answer:
        self._count(sum(len(name) + len(value) for name, value in answer.headers))
        return passed(answer.headers, NOT_DOWN)

    def feed(self, chunk: bytes) -> bytes:
        self._count(len(chunk))
        return chunk

    def _count(self, size: int) -> None:
        self._traffic.add(size)
        if self._traffic.exceeded:
            raise ConnectionAbortedError
