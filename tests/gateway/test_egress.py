"""The network through the gateway: tunnels and plain HTTP, what each level allows, and ways around it that are none."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from taskyard.gateway import addresses, egress
from taskyard.gateway.connection import MAX_LOOKUPS
from taskyard.gateway.hosts import HostRules
from taskyard.gateway.policy import Network
from taskyard.gateway.upstream import Upstream, UpstreamRequest, UpstreamResponse
from tests.gateway.test_client_hello import client_hello
from tests.support.certificates import make_certificate
from tests.support.door import Door, Exchange, eventually, open_door, open_upstream

NAMES = ["allowed.test", "sub.allowed.test", "other.test"]
ON_THIS_MACHINE = HostRules(NAMES, None)


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are those of a server on this machine."""

    async def look_up(name: str, port: int, *, internal: bool) -> list[Any]:
        return [ipaddress.ip_address("127.0.0.1" if name in NAMES else "10.11.12.13")]

    monkeypatch.setattr(addresses, "_look_up", look_up)


def listed(*rules: str, **more: Any) -> Network:
    return Network("listed", HostRules(rules), ON_THIS_MACHINE, **more)


FULL = Network("full", internal=ON_THIS_MACHINE)


@asynccontextmanager
async def echo(port: int = 0) -> AsyncIterator[int]:
    """A server that sends back what it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write(b"!")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def connect(
    stack: AsyncExitStack, door: Door, target: str, headers: str = ""
) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
    """The head of the answer to CONNECT, and the connection, which ends with the stack."""
    reader, writer = await door.connect()
    stack.callback(writer.transport.abort)
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{headers}\r\n".encode())
    async with asyncio.timeout(60):
        return await reader.readuntil(b"\r\n\r\n"), reader, writer


async def refusal(door: Door, request: bytes) -> tuple[int, str]:
    answer = await door.send(request)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


# --- tunnels ---


@pytest.mark.parametrize("level", ["full", "listed"])
async def test_a_tunnel_passes_bytes_both_ways(level: str) -> None:
    async with echo() as port:
        network = FULL if level == "full" else listed(f"allowed.test:{port}")
        async with open_door(network=network) as door, asyncio.timeout(60), AsyncExitStack() as stack:
            head, reader, writer = await connect(
                stack, door, f"allowed.test:{port}", "Proxy-Authorization: Basic eDp5\r\n"
            )
            assert head.startswith(b"HTTP/1.1 200 ")
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            writer.write(b"two")
            writer.write_eof()
            assert await reader.read() == b"two!", "the end of one side reaches the other"
        assert not door.refusals


async def test_bytes_may_come_with_the_request() -> None:
    async with (
        echo() as port,
        open_door(network=FULL) as door,
        asyncio.timeout(60),
        AsyncExitStack() as stack,
    ):
        reader, writer = await door.connect()
        stack.callback(writer.transport.abort)
        writer.write(f"CONNECT allowed.test:{port} HTTP/1.1\r\nHost: x\r\n\r\nearly".encode())
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"early"


async def test_large_amounts() -> None:
    data = bytes(range(256)) * 80_000
    async with (
        echo() as port,
        open_door(network=FULL) as door,
        asyncio.timeout(120),
        AsyncExitStack() as stack,
    ):
        _, reader, writer = await connect(stack, door, f"allowed.test:{port}")

        async def send() -> None:
            for at in range(0, len(data), 1 << 20):
                writer.write(data[at : at + (1 << 20)])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        got = await reader.read()
        await sending
    assert hashlib.sha256(got).digest() == hashlib.sha256(data + b"!").digest()


@pytest.mark.parametrize(
    ("target", "network", "status", "reason", "rule"),
    [
        ("other.test:443", listed("allowed.test"), 403, "add 'other.test' to allowed_domains", "other.test"),
        ("other.test:8443", listed("other.test"), 403, "add 'other.test:8443' to", "other.test:8443"),
        ("sub.allowed.test:443", listed("allowed.test"), 403, "not among the hosts", "sub.allowed.test"),
        ("allowed.test:443", listed("*.allowed.test"), 403, "not among the hosts", "allowed.test"),
        ("allowed.test:443", listed(), 403, "not among the hosts", "allowed.test"),
        ("evil-allowed.test:443", listed("allowed.test"), 403, "not among", "evil-allowed.test"),
        (
            "allowed.test.evil.example:443",
            listed("allowed.test"),
            403,
            "not among",
            "allowed.test.evil.example",
        ),
        ("1.1.1.1:443", listed("allowed.test"), 403, "not among", "1.1.1.1"),
        ("internal.example:443", listed("internal.example"), 403, "not on the public internet", None),
        ("internal.example:443", Network("full"), 403, "not on the public internet", None),
        ("127.0.0.1:443", Network("full"), 403, "not on the public internet", None),
        ("[::1]:443", Network("full"), 403, "not on the public internet", None),
        ("[::ffff:127.0.0.1]:443", Network("full"), 403, "not on the public internet", None),
        ("169.254.169.254:80", Network("full"), 403, "not on the public internet", None),
        ("localhost:80", Network("full"), 403, "no name of the public internet", None),
        ("allowed.test:443", Network(), 403, "no access to the network", None),
        ("2130706433:80", Network("full"), 400, "no valid address", None),
        ("0x7f.1:80", Network("full"), 400, "no valid address", None),
        ("allowed.test", Network("full"), 400, "no port", None),
        ("allowed.test:0", Network("full"), 400, "out of range", None),
        ("ex%61mple.org:443", Network("full"), 400, "no valid host name", None),
        ("me:pw@allowed.test:443", listed("allowed.test"), 400, "no valid host name", None),
        ("allowed.test:443/path", listed("allowed.test"), 400, "CONNECT takes host:port", None),
    ],
)
async def test_tunnels_that_are_refused(
    target: str, network: Network, status: int, reason: str, rule: str | None
) -> None:
    async with open_door(network=network) as door:
        got, body = await refusal(
            door, f"CONNECT {target} HTTP/1.1\r\nHost: allowed.test:443\r\n\r\n".encode()
        )
    assert got == status
    assert reason in body
    [told] = door.refusals
    assert (told.method, told.status, told.rule) == ("CONNECT", status, rule)
    assert reason in told.reason
    assert "pw" not in str(told)


async def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with open_door(network=FULL) as door:
        status, body = await refusal(
            door, f"CONNECT allowed.test:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        )
    assert status == 502
    assert f"allowed.test could not be reached on port {port}" in body


async def test_what_was_checked_is_what_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that changes its address after it was looked up."""
    answers = ["127.0.0.1", "127.0.0.2"]

    async def look_up(name: str, port: int, *, internal: bool) -> list[Any]:
        return [ipaddress.ip_address(answers.pop(0))]

    monkeypatch.setattr(addresses, "_look_up", look_up)
    async with (
        echo() as port,
        open_door(network=FULL) as door,
        asyncio.timeout(60),
        AsyncExitStack() as stack,
    ):
        head, _, _ = await connect(stack, door, f"allowed.test:{port}")
        assert b" 200 " in head
    assert answers == ["127.0.0.2"]


async def test_the_machines_own_address_is_internal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    async with echo() as port, open_door(network=Network("full")) as door:
        status, body = await refusal(door, f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert status == 403
    assert "not on the public internet" in body


async def test_idle_tunnels_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "TUNNEL_IDLE_S", 0.2)
    async with (
        echo() as port,
        open_door(network=FULL) as door,
        asyncio.timeout(60),
        AsyncExitStack() as stack,
    ):
        _, reader, _ = await connect(stack, door, f"allowed.test:{port}")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)


async def test_a_limit_of_bytes() -> None:
    network = Network("full", internal=ON_THIS_MACHINE, max_bytes=1_000_000)
    async with (
        echo() as port,
        open_door(network=network) as door,
        asyncio.timeout(60),
        AsyncExitStack() as stack,
    ):
        _, reader, writer = await connect(stack, door, f"allowed.test:{port}")
        writer.write(b"x" * 900_000)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(900_000)
        status, body = await refusal(
            door, f"CONNECT allowed.test:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        )
    assert status == 403
    assert "network.max_bytes" in body


async def test_names_are_looked_up_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose name servers never answer does not fill the resolvers of the others."""
    asked, most = 0, 0
    go_on = asyncio.Event()

    async def look_up(name: str, port: int, *, internal: bool) -> list[Any]:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        await go_on.wait()
        asked -= 1
        return [ipaddress.ip_address("10.11.12.13")]

    monkeypatch.setattr(addresses, "_look_up", look_up)
    request = b"CONNECT slow.example:443 HTTP/1.1\r\nHost: x\r\n\r\n"
    async with open_door(network=Network("full")) as slow, open_door(network=Network("full")) as other:
        waiting = [asyncio.create_task(slow.send(request)) for _ in range(20)]
        await eventually(lambda: asked == MAX_LOOKUPS, "lookups")
        another = asyncio.create_task(other.send(request))
        await eventually(lambda: asked == MAX_LOOKUPS + 1, "a lookup of another run")
        assert most == MAX_LOOKUPS + 1
        go_on.set()
        assert all(answer.startswith(b"HTTP/1.1 403") for answer in await asyncio.gather(*waiting, another))
    assert (len(slow.refusals), len(other.refusals)) == (20, 1)


# --- TLS in tunnels ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls") / "server.pem", NAMES)


@asynccontextmanager
async def tls_server(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, curve: str | None = None
) -> AsyncIterator[list[str | None]]:
    """A TLS server to which port 443 of every name leads; the names that it is asked for. curve: the only one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            writer.close()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    asked: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    if curve is not None:
        context.set_ecdh_curve(curve)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port, connect = server.sockets[0].getsockname()[1], addresses.connect

    async def lead(found: Any, asked: int) -> Any:
        return await connect(found, port)

    monkeypatch.setattr(addresses, "connect", lead)
    async with server:
        yield asked


async def test_tls_for_the_host_of_the_tunnel(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual client, end to end."""
    context = ssl.create_default_context(cafile=str(certificate))
    async with (
        tls_server(certificate, monkeypatch),
        open_door(network=listed("allowed.test")) as door,
        httpx.AsyncClient(proxy=door.url, verify=context, trust_env=False, timeout=60) as client,
    ):
        assert (await client.get("https://allowed.test/")).text == "ok"
        with pytest.raises(httpx.ProxyError, match="403"):
            await client.get("https://other.test/")
    assert [told.rule for told in door.refusals] == ["other.test"]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (client_hello("other.test"), "asks for another server, other.test"),
        (client_hello("sub.allowed.test"), "asks for another server"),
        (client_hello(None), "does not say which server"),
        (b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n", "port 443 is for TLS"),
        (b"SSH-2.0-x\r\n", "port 443 is for TLS"),
    ],
    ids=["another", "below", "none", "http", "ssh"],
)
async def test_tls_for_another_host(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, first: bytes, reason: str
) -> None:
    async with (
        tls_server(certificate, monkeypatch),
        open_door(network=listed("allowed.test", "sub.allowed.test")) as door,
        asyncio.timeout(60),
        AsyncExitStack() as stack,
    ):
        head, reader, writer = await connect(stack, door, "allowed.test:443")
        assert b" 200 " in head
        for byte in range(len(first)):  # as slowly as can be
            writer.write(first[byte : byte + 1])
        assert await reader.read() == b"\x15\x03\x03\x00\x02\x02\x70", "an alert, and nothing of the server"
        await eventually(lambda: bool(door.refusals), "the refusal was not told")
    [told] = door.refusals
    assert (told.method, told.target, told.status) == ("CONNECT", "allowed.test:443", 403)
    assert reason in told.reason


ASKS_AGAIN = "prime256v1"
"""A client offers another curve first, so a server with this one alone asks for a second hello."""


async def test_a_second_hello(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    async with (
        tls_server(certificate, monkeypatch, ASKS_AGAIN) as asked,
        open_door(network=listed("allowed.test")) as door,
        httpx.AsyncClient(proxy=door.url, verify=context, trust_env=False, timeout=60) as client,
    ):
        assert (await client.get("https://allowed.test/")).text == "ok"
    assert asked == ["allowed.test", "allowed.test"]
    assert not door.refusals


@pytest.mark.parametrize("ahead", ["waiting", "at once", "after early data"])
async def test_a_second_hello_for_another_host(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, ahead: str
) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(coming, going, server_hostname="allowed.test")
    async with (
        tls_server(certificate, monkeypatch, ASKS_AGAIN) as asked,
        open_door(network=listed("allowed.test")) as door,
        asyncio.timeout(60),
        AsyncExitStack() as stack,
    ):
        _, reader, writer = await connect(stack, door, "allowed.test:443")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        first = going.read()
        if ahead == "at once":
            writer.write(first + first.replace(b"allowed.test", b"another.test"))
        else:
            writer.write(first)
            coming.write(await reader.read(65536))
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            second = going.read()
            assert b"allowed.test" in second, "the server has not asked again"
            early = b"\x17\x03\x03\x00\x03abc" if ahead == "after early data" else b""
            writer.write(early + second.replace(b"allowed.test", b"another.test"))
        assert (await reader.read()).endswith(b"\x15\x03\x03\x00\x02\x02\x70")
        await eventually(lambda: bool(door.refusals), "the refusal was not told")
    assert asked == ["allowed.test"]
    [told] = door.refusals
    assert "asks for another server, another.test" in told.reason


async def test_the_name_may_be_written_otherwise(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        tls_server(certificate, monkeypatch),
        open_door(network=listed("allowed.test")) as door,
        asyncio.timeout(60),
        AsyncExitStack() as stack,
    ):
        _, reader, writer = await connect(stack, door, "ALLOWED.test.:443")
        writer.write(client_hello("Allowed.Test"))
        assert (await reader.readexactly(1)) == b"\x16", "the server's answer"
    assert not door.refusals


# --- plain HTTP ---


async def test_plain_http() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"hello", headers="Set-Cookie: a=b\r\nProxy-Authenticate: x\r\nX-Own: 1\r\n")

    async with open_upstream(handler) as (url, seen):
        port = int(url.rpartition(":")[2])
        async with open_door(network=listed(f"allowed.test:{port}")) as door:
            request = (
                f"POST http://Allowed.Test:{port}/a/b?c=d%20e HTTP/1.1\r\nHost: other.test\r\nCookie: own=1\r\n"
                "Proxy-Authorization: Basic x\r\nProxy-Connection: keep-alive\r\nConnection: close, X-Hop\r\n"
                "X-Hop: 1\r\nAuthorization: Bearer own\r\nContent-Length: 3\r\n\r\nabc"
            )
            answer = await door.send(request.encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b"hello"
    assert b"set-cookie: a=b" in head.lower()
    assert b"x-own: 1" in head.lower()
    assert b"proxy-authenticate" not in head.lower()
    [sent] = seen
    assert (sent.method, sent.target, sent.body) == ("POST", "/a/b?c=d%20e", b"abc")
    assert sent.headers["host"] == [f"allowed.test:{port}"], "the URL's host, whatever the header says"
    assert sent.headers["authorization"] == ["Bearer own"]
    assert not {"proxy-authorization", "proxy-connection", "x-hop"} & sent.headers.keys()


async def test_a_tunnel_to_port_80_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header Host could name any other site of the same content network."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"ok")

    async with open_upstream(handler) as (url, seen):
        lead_port_80_to(monkeypatch, url)
        async with (
            open_door(network=listed("allowed.test")) as door,
            asyncio.timeout(60),
            AsyncExitStack() as stack,
        ):
            head, reader, writer = await connect(stack, door, "allowed.test:80")
            assert b" 200 " in head
            writer.write(b"GET /a?b=c HTTP/1.1\r\nHost: other.test\r\n\r\n")
            writer.write(b"POST /d HTTP/1.1\r\nHost: other.test\r\nContent-Length: 2\r\n\r\nhi")
            writer.write(b"GET http://other.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n")
            answer = await reader.read()
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"200", b"400"]
    assert [(one.method, one.target) for one in seen] == [("GET", "/a?b=c"), ("POST", "/d")]
    assert [one.body for one in seen] == [b"", b"hi"]
    assert [one.headers["host"] for one in seen] == [["allowed.test"]] * 2
    [told] = door.refusals
    assert told.status == 400


@pytest.mark.parametrize(
    "first",
    [
        b"SSH-2.0-x\r\n\r\n",
        client_hello("allowed.test") + b"\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"connect / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["ssh", "tls", "connect", "connect to a path", "in small letters"],
)
async def test_a_tunnel_to_port_80_takes_nothing_else(first: bytes) -> None:
    async with (
        open_door(network=listed("allowed.test")) as door,
        asyncio.timeout(60),
        AsyncExitStack() as stack,
    ):
        _, reader, writer = await connect(stack, door, "allowed.test:80")
        writer.write(first)
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
    assert len(door.refusals) == 1


def lead_port_80_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Requests for port 80 go to the server of the test."""
    asked = Upstream.send

    async def lead(self: Upstream, request: UpstreamRequest) -> UpstreamResponse:
        if request.origin.port == 80:
            request = replace(request, origin=replace(request.origin, port=int(url.rpartition(":")[2])))
        return await asked(self, request)

    monkeypatch.setattr(Upstream, "send", lead)


@pytest.mark.parametrize("what", ["body", "heads"])
async def test_a_limit_of_bytes_for_plain_http(what: str) -> None:
    """One upload without end, and many requests whose heads carry the bytes."""
    arrived = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal arrived
        arrived += len(exchange.body) + len(str(exchange.headers))
        if what == "heads":
            await exchange.answer(b"")
            return
        while data := await exchange.reader.read(65536):
            arrived += len(data)

    async with open_upstream(handler, read_body=what == "heads") as (url, _):
        port = int(url.rpartition(":")[2])
        network = Network("full", internal=ON_THIS_MACHINE, max_bytes=1_000_000)
        async with open_door(network=network) as door, asyncio.timeout(60):
            line = f"POST http://allowed.test:{port}/ HTTP/1.1\r\nHost: x\r\n"
            if what == "body":
                request = f"{line}Content-Length: 9000000\r\n\r\n".encode() + b"x" * 9_000_000
            else:
                request = (f"{line}X: {'x' * 50_000}\r\nContent-Length: 0\r\n\r\n" * 100).encode()
            reader, writer = await door.connect()
            writer.write(request)
            with suppress(ConnectionError):
                await reader.read()
            writer.transport.abort()
            await eventually(lambda: arrived > 500_000, "nothing arrived")
            status, body = await refusal(door, f"{line}Content-Length: 0\r\n\r\n".encode())
    assert status == 403
    assert "network.max_bytes" in body
    assert arrived < 1_100_000


async def test_heads_of_answers_count() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"", headers=f"X: {'x' * 30_000}\r\n")

    async with open_upstream(handler) as (url, seen):
        port = int(url.rpartition(":")[2])
        network = Network("full", internal=ON_THIS_MACHINE, max_bytes=100_000)
        async with open_door(network=network) as door:
            request = f"GET http://allowed.test:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            await door.send(request * 20)
    assert len(seen) == 4


async def test_requests_on_one_connection_are_each_checked() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"ok")

    async with open_upstream(handler) as (url, seen):
        port = int(url.rpartition(":")[2])
        async with open_door(network=listed(f"allowed.test:{port}")) as door:
            good = f"GET http://allowed.test:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n"
            bad = f"GET http://other.test:{port}/ HTTP/1.1\r\nHost: allowed.test\r\n\r\n"
            answer = await door.send((good + good + bad + good).encode())
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"200", b"403"]
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("target", "status", "reason"),
    [
        ("http://other.test/", 403, "add 'other.test' to"),
        ("http://allowed.test:8080/", 403, "add 'allowed.test:8080' to"),
        ("http://me:pw@allowed.test/", 400, "belong in the header Authorization"),
        ("http://allowed.test@other.test/", 400, "belong in the header"),
        ("http://allowed.test#@other.test/", 400, "without a fragment"),
        ("http://other.test\\@allowed.test/", 400, "belong in the header"),
        ("http://other.test\\.allowed.test/", 400, "no valid host name"),
        ("http://allowed.test%2eother.test/", 400, "no valid host name"),
        ("http://allowed.test%00.other.test/", 400, "no valid host name"),
        ("http:///allowed.test/", 400, "takes http URLs"),
        ("http:allowed.test", 400, "takes http URLs"),
        ("https://allowed.test/", 400, "CONNECT"),
        ("ftp://allowed.test/", 400, "takes http URLs"),
        ("file:///etc/passwd", 400, "takes http URLs"),
        ("gopher://allowed.test/", 400, "takes http URLs"),
        ("*", 400, "takes http URLs"),
        ("http://[::ffff:a9fe:a9fe]/", 403, "not among"),
        ("http://0177.0.0.1/", 400, "no valid address"),
    ],
)
async def test_plain_http_that_is_refused(target: str, status: int, reason: str) -> None:
    async with open_door(network=listed("allowed.test")) as door:
        got, body = await refusal(door, f"GET {target} HTTP/1.1\r\nHost: allowed.test\r\n\r\n".encode())
    assert (got, len(door.refusals)) == (status, 1)
    assert reason in body
    assert "pw" not in str(door.refusals)


async def test_model_traffic_goes_on_whatever_the_network() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"{}")

    async with open_upstream(handler) as (url, _):
        for network in (Network(), listed(), FULL):
            async with open_door(url, network=network) as door:
                assert (await door.post("/anthropic/v1/messages", b"{}")).status_code == 200
