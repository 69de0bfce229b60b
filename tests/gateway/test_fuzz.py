"""Generated input for everything in the gateway that reads bytes of an agent: no crash, no hang, no way around it.

In the suite a short round each; `scripts/fuzz-gateway` gives each ten minutes. Whatever passes is held against a second
opinion: OpenSSL for the server name, git's own way to read a push, and what the upstreams were really asked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import h11
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from taskyard.gateway import addresses
from taskyard.gateway.addresses import UnreachableError
from taskyard.gateway.answer_parser import AnswerParser
from taskyard.gateway.calls import _cut
from taskyard.gateway.client_hello import BadHelloError, HelloReader
from taskyard.gateway.connection import Connection, Side
from taskyard.gateway.egress import Traffic
from taskyard.gateway.hosts import HostRules
from taskyard.gateway.models import KeyMask, ModelRoute
from taskyard.gateway.pkt_line import BadPushError, PushReader
from taskyard.gateway.policy import GitRepository, Network, Policy, Tool, ToolAnswer
from taskyard.gateway.upstream import Upstream, UpstreamRequest, UpstreamResponse
from taskyard.gateway.usage import Meter, SseParser
from tests.gateway.test_client_hello import client_hello, extension, in_records, names
from tests.gateway.test_pkt_line import command, pkt
from tests.gateway.test_usage import ANTHROPIC_STREAM, CHAT_STREAM, RESPONSES_STREAM

SECONDS = float(os.environ.get("TASKYARD_TEST_FUZZ_SECONDS", "0"))
ROUND = 100
KEY, TOKEN = "sk-key-that-stays-outside", "token-that-stays-outside"


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], object]) -> None:
    """Rounds of examples until the time is over; at least one."""
    end, count = time.monotonic() + SECONDS, 0
    examples = ROUND if SECONDS == 0 else 2000
    while True:
        count += examples
        number = random.randrange(2**32)
        phases = [Phase.generate, Phase.shrink]

        @seed(number)
        @settings(
            max_examples=examples, deadline=None, database=None, phases=phases,
            suppress_health_check=list(HealthCheck), print_blob=True,
        )  # fmt: skip
        @given(strategy)
        def one_round(example: Any) -> None:
            check(example)

        one_round()
        if time.monotonic() >= end:
            print(f"{count} examples")
            return


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """One of the seeds, or several, with pieces taken out, repeated and put in."""
    data = b"".join(draw(st.lists(st.sampled_from(seeds), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        piece = draw(st.sampled_from(tokens) | st.binary(max_size=6) | st.just(data[at:end] * 2))
        data = data[:at] + piece + data[end:]
    return data


@st.composite
def with_cuts(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> tuple[bytes, list[bytes]]:
    """Bytes, and the same in pieces."""
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    return whole, [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


# --- whole connections ---


class Pipe:
    """Stands in for the client's side of a connection."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.transport = self

    def write(self, data: bytes) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    async def drain(self) -> None:
        pass


class Canned:
    """What every upstream answers."""

    status = 200
    headers: ClassVar = [(b"content-type", b"application/x-git-x")]

    def header(self, name: bytes) -> str:
        return dict(self.headers).get(name, b"").decode()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"ok"

    def close(self) -> None:
        pass


@dataclass
class Outside(Upstream):
    """Every way out, and what was asked on it."""

    requests: list[UpstreamRequest] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)
    connected: list[tuple[Any, int]] = field(default_factory=list)
    found: list[Any] = field(default_factory=lambda: [ipaddress.ip_address("127.0.0.1")])

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        request.head()  # it can be sent
        if request.body is not None and not isinstance(request.body, bytes):
            async for _ in request.body:
                pass
        self.requests.append(request)
        return cast(UpstreamResponse, Canned())

    async def look_up(self, name: str, port: int, *, internal: bool) -> list[Any]:
        self.looked_up.append(name)
        return self.found

    async def connect(self, found: Sequence[Any], port: int) -> Any:
        self.connected += [(address, port) for address in found]
        raise UnreachableError("is a test")


async def converse(data: bytes, network: Network, found: list[Any] | None = None) -> tuple[Outside, bytes]:
    """What one connection that sends these bytes leads to."""

    async def token() -> str | None:
        return TOKEN

    async def submit(_: dict[str, Any]) -> ToolAnswer:
        return ToolAnswer("taken")

    outside, pipe = Outside(), Pipe()
    if found is not None:
        outside.found = found
    addresses._look_up, addresses.connect = outside.look_up, outside.connect  # type: ignore[assignment]
    policy = Policy(
        "run", {"anthropic": ModelRoute("https://model.test/base", KEY)}, network,
        [GitRepository("acme/shop", "https://git.test/acme/shop.git", ("own",), token)],
        tools=[Tool("submit", "Takes.", {"type": "object"}, submit)],
    )  # fmt: skip
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    side = Side(policy, outside, Traffic(None), lambda _: None, lambda _: None)
    try:
        async with asyncio.timeout(20):
            await Connection(reader, cast(asyncio.StreamWriter, pipe), side).run()
    except ConnectionAbortedError:
        pass
    return outside, bytes(pipe.written)


@pytest.fixture
def ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what `converse` replaces."""
    monkeypatch.setattr(addresses, "_look_up", addresses._look_up)
    monkeypatch.setattr(addresses, "connect", addresses.connect)


ALLOWED = HostRules(["allowed.test", "*.wild.test", "odd.test:8443", "203.0.113.7"])
LISTED = Network(
    "listed", ALLOWED, HostRules(["allowed.test", "*.wild.test", "odd.test", "203.0.113.7"], None)
)
MODEL_PATHS = {
    b"/base/v1/messages",
    b"/base/v1/messages/count_tokens",
    b"/base/v1/models",
    b"/base/api/hello",
}
GIT_PATHS = {
    b"/acme/shop.git/info/refs?service=git-upload-pack",
    b"/acme/shop.git/info/refs?service=git-receive-pack",
    b"/acme/shop.git/git-upload-pack",
    b"/acme/shop.git/git-receive-pack",
}


def may_reach(name: str, port: int) -> bool:
    """Whether LISTED allows it, said in another way."""
    if name == "odd.test":
        return port == 8443
    known = name in ("allowed.test", "203.0.113.7") or re.fullmatch(r"[^:]+\.wild\.test", name) is not None
    return known and port in (22, 80, 443)


def hold_to_the_rules(outside: Outside, written: bytes) -> None:
    for request in outside.requests:
        headers: dict[str, list[str]] = {}
        for raw, value in request.headers:
            headers.setdefault(raw.decode(), []).append(value.decode("latin-1"))
        target, host = request.target, request.origin.host
        secrets = [one for values in headers.values() for one in values if KEY in one or TOKEN in one]
        if host == "model.test":
            path = target.partition(b"?")[0]
            assert path in MODEL_PATHS or re.fullmatch(rb"/base/v1/models/[A-Za-z0-9][\w.:@-]*", path), target
            assert headers["x-api-key"] == [KEY]
            assert "authorization" not in headers
            assert "cookie" not in headers
        elif host == "git.test":
            assert target in GIT_PATHS
            assert len(headers["authorization"]) == 1
            assert not {"cookie", "x-api-key"} & headers.keys()
        else:
            assert host in ("127.0.0.1", "203.0.113.7")
            [shown] = headers["host"]
            name, _, port = shown.partition(":")
            assert may_reach(name, int(port or 80)), shown
            assert request.origin.port == int(port or 80)
            assert target.startswith(b"/")
            assert request.method != "CONNECT"
            assert not secrets
    for name in outside.looked_up:
        assert name in ("allowed.test", "odd.test") or name.endswith(".wild.test"), name
    assert {port for _, port in outside.connected} <= {22, 80, 443, 8443}
    assert KEY.encode() not in written
    assert written == b"" or re.match(rb"HTTP/1\.1 \d{3} ", written)


HOSTS = [
    b"allowed.test",
    b"other.test",
    b"x.wild.test",
    b"wild.test",
    b"odd.test",
    b"203.0.113.7",
    b"127.0.0.1",
    b"[::1]",
    b"[::ffff:127.0.0.1]",
    b"169.254.169.254",
    b"localhost",
    b"2130706433",
    b"0x7f.1",
    b"allowed.test.",
    b"ALLOWED.test",
    b"xn--bcher-kva.test",
    b"[fe80::1%25eth0]",
]
PIECES = [
    b":",
    b"/",
    b"@",
    b"#",
    b"?",
    b"\\",
    b"%",
    b"%00",
    b"%2e",
    b"..",
    b".",
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b"[",
    b"]",
    b"*",
    b"443",
    b"80",
    b"8443",
    b"22",
    b"0",
    b"65536",
    b"-1",
    b"allowed.test",
    b"other.test",
    b"evil.wild.test",
    b"http://",
    b"https://",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"\xc3\xa9",
    b"\xff",
]


def test_connect_heads(ways_out: None) -> None:
    heads = [
        b"CONNECT %s:%d HTTP/1.1\r\nHost: other.test\r\n\r\n" % (host, port)
        for host in HOSTS
        for port in (443, 80, 8443)
    ]
    within = [
        b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n",
        b"GET http://other.test/ HTTP/1.1\r\nHost: x\r\n\r\n",
    ]

    def check(data: bytes) -> None:
        outside, written = asyncio.run(converse(data, LISTED))
        hold_to_the_rules(outside, written)

    fuzz(mutated([*heads, *within], PIECES), check)


IPV4 = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address)
INSIDE = st.sampled_from(
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.0.192",
        "168.63.129.16",
        "198.18.0.1",
    ]
).map(ipaddress.IPv4Address)
WRAPPED = st.tuples(
    IPV4 | INSIDE, st.sampled_from(["::ffff:0:0", "64:ff9b::", "2002::", "::", "64:ff9b:1::"])
).map(
    lambda pair: ipaddress.IPv6Address(
        int(ipaddress.IPv6Address(pair[1])) | (int(pair[0]) << 80 if pair[1] == "2002::" else int(pair[0]))
    )
)
ANY_ADDRESS = IPV4 | INSIDE | WRAPPED | st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address)


def reaches_inside(address: Any) -> bool:
    """Whether it is an address of no public host, said in another way."""
    if address.version == 6:
        number = int(address)
        if number >> 32 in (0xFFFF, 0x0064FF9B << 64):
            return reaches_inside(ipaddress.IPv4Address(number & 0xFFFFFFFF))
        if number >> 112 == 0x2002:
            return reaches_inside(ipaddress.IPv4Address((number >> 80) & 0xFFFFFFFF))
        return number >> 125 != 1 or address.is_private
    special = [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/3",
        "168.63.129.16/32",
    ]
    return any(address in ipaddress.IPv4Network(network) for network in special)


def test_addresses_of_names(ways_out: None) -> None:
    """Whatever a name leads to, and whatever address a target is: nothing inside is connected to."""
    head = b"CONNECT some.example:443 HTTP/1.1\r\nHost: x\r\n\r\n"
    literal = ANY_ADDRESS.map(
        lambda one: (
            f"CONNECT {f'[{one}]' if one.version == 6 else one}:443 HTTP/1.1\r\nHost: x\r\n\r\n"
        ).encode()
    )

    def check(example: tuple[bytes, list[Any]]) -> None:
        data, found = example
        outside, _ = asyncio.run(converse(data, Network("full"), found))
        assert not [address for address, _ in outside.connected if reaches_inside(address)]
        assert not outside.requests

    fuzz(st.tuples(st.just(head) | literal, st.lists(ANY_ADDRESS, min_size=1, max_size=3)), check)


REQUESTS = [
    b"POST /anthropic/v1/messages?beta=true HTTP/1.1\r\nHost: x\r\nx-api-key: inside\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /anthropic/v1/messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"GET /anthropic/v1/models/claude-a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer inside\r\nCookie: a=b\r\n\r\n",
    b"GET http://allowed.test/a?b HTTP/1.1\r\nHost: other.test\r\n\r\n",
    b"POST http://x.wild.test:80/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: Host\r\n\r\nabc",
    b"GET http://other.test/ HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
    b"GET /git/acme/shop.git/info/refs?service=git-upload-pack HTTP/1.1\r\nHost: x\r\nCookie: eDp5\r\n\r\n",
    b"POST /git/acme/shop/git-upload-pack HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n0000",
    b"POST /git/acme/shop/git-receive-pack HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n0000",
    b"CONNECT allowed.test:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /taskyard/mcp HTTP/1.1\r\nHost: x\r\nMCP-Protocol-Version: 2025-11-25\r\n\r\n",
    b'POST /taskyard/mcp HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n{"jsonrpc":"2.0","id":1,"method":"ping"}',
]
FIELDS = [
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Connection: x-api-key, authorization, content-length\r\n",
    b"Upgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"Host: other.test\r\n",
    b"Proxy-Authorization: Basic x\r\n",
    b"\r\n\r\n",
    b" folded\r\n",
    b"x-api-key : inside\r\n",
    b"/../",
    b"//",
    b"/./",
    b"GET ",
    b"POST ",
    b"/anthropic",
    b"/openai",
    b"/git/",
    b"/taskyard/mcp",
    b"/v1/messages",
]


def test_http_heads(ways_out: None) -> None:
    def check(data: bytes) -> None:
        outside, written = asyncio.run(converse(data, LISTED))
        hold_to_the_rules(outside, written)
        # What comes back is HTTP, however the requests look.
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(written or b"HTTP/1.1 204 \r\n\r\n")
        event: Any = None
        while event is not h11.NEED_DATA and not isinstance(event, h11.EndOfMessage):
            event = client.next_event()

    fuzz(mutated(REQUESTS, [*PIECES, *FIELDS]), check)


# --- pushes ---


def as_git_reads(data: bytes) -> list[bytes] | None:
    """The refs of a push as receive-pack.c reads them (read_head_info, queue_command); None: it gives up."""
    refs: list[bytes] = []
    at = 0
    while True:
        head = data[at : at + 4]
        if len(head) < 4 or not re.fullmatch(rb"[0-9a-fA-F]{4}", head):
            return None
        size = int(head, 16)
        if size in (0, 1, 2):
            return refs if size == 0 else None
        if size == 3 or len(data) < at + size:
            return None
        line = data[at + 4 : at + size]
        line = line.removesuffix(b"\n")
        at += size
        text, _, features = line.partition(b"\0")
        if len(line) > 8 and line.startswith(b"shallow "):
            if not re.match(rb"[0-9a-f]{40}", line[8:]):
                return None
            continue
        if text == b"push-cert" or b"push-options" in features.split(b"\0")[0]:
            return None
        match = re.match(rb"(?:[0-9a-f]{64} [0-9a-f]{64}|[0-9a-f]{40} [0-9a-f]{40}) ", text)
        if match is None:
            return None
        refs.append(text[match.end() :])


def test_pushes() -> None:
    seeds = [
        command("refs/heads/own", capabilities="report-status side-band-64k"),
        command("refs/heads/main"),
        b"0000",
        b"0000PACK",
        pkt(f"shallow {'a' * 40}"),
        pkt("push-cert\0 x\n"),
        command("refs/heads/own\0refs/heads/main"),
        command("refs/heads/own", new="0" * 40),
        command("refs/heads/own", "1" * 64, "2" * 64),
        b"0001",
        b"0004",
        b"0005\n",
    ]
    tokens = [
        b"\0",
        b"\n",
        b" ",
        b"0000",
        b"0001",
        b"0004",
        b"refs/heads/main",
        b"push-options",
        b"shallow ",
        b"a" * 40,
    ]

    def check(example: tuple[bytes, list[bytes]]) -> None:
        data, parts = example
        outcomes: list[list[str] | None] = []
        for pieces in ([data], parts):
            reader = PushReader()
            try:
                for piece in pieces:
                    if not reader.complete:
                        reader.feed(piece)
            except BadPushError:
                outcomes.append(None)
            else:
                outcomes.append([one.ref for one in reader.updates] if reader.complete else [])
                assert not reader.complete or bytes(reader.seen) == data[: len(reader.seen)]
        assert outcomes[0] == outcomes[1]
        if outcomes[0]:
            assert [ref.encode() for ref in outcomes[0]] == as_git_reads(data)

    fuzz(with_cuts(mutated(seeds, tokens)), check)


# --- TLS ---

SERVER = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def as_openssl_reads(data: bytes) -> str | None:
    """The server name that a real TLS server takes from these bytes; None: none, or it has not got that far."""
    seen: list[str | None] = []

    def told(connection: Any, name: str | None, context: Any) -> None:
        seen.append(name)

    SERVER.sni_callback = told
    incoming = ssl.MemoryBIO()
    incoming.write(data)
    server = SERVER.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    try:
        server.do_handshake()
    except ssl.SSLError:
        pass
    return next((name for name in seen if name is not None), None)


def test_client_hellos() -> None:
    plain, bare = client_hello("allowed.test"), client_hello(None)
    seeds = [
        plain,
        bare,
        client_hello("other.test"),
        in_records(plain, 9),
        extension(plain, 0, names((0, b"other.test"))),
        extension(bare, 0, names((0, b"a.test"), (0, b"b.test"))),
        extension(bare, 0xFE0D, b"x" * 30),
    ]
    tokens = [
        b"\x16\x03\x01",
        b"\x14\x03\x03\x00\x01\x01",
        b"\x00\x00",
        b"\x01\x00",
        b"allowed.test",
        b"other.test",
        b"\xff\xff",
    ]

    def check(example: tuple[bytes, list[bytes]]) -> None:
        data, parts = example
        outcomes: list[str | None] = []
        for pieces in ([data], parts):
            reader, name = HelloReader(), None
            try:
                for piece in pieces:
                    name = reader.feed(piece)
                    if name is not None:
                        break
            except BadHelloError:
                name = None
            outcomes.append(name)
        assert outcomes[0] == outcomes[1]
        if outcomes[0] is not None:
            seen = as_openssl_reads(data)
            assert seen is None or seen.lower() == outcomes[0].lower()

    assert as_openssl_reads(plain) == "allowed.test"
    fuzz(with_cuts(mutated(seeds, tokens)), check)


# --- answers ---


def events_of(data: bytes) -> list[bytes]:
    """The data of the events of a whole stream, line by line as the standard has it."""
    found: list[bytes] = []
    held: list[bytes] = []
    for line in re.split(rb"\r\n|\n|\r", data)[:-1]:
        if line == b"":
            if held:
                found.append(b"\n".join(held))
            held = []
        elif line.startswith(b"data:"):
            held.append(line[5:].removeprefix(b" "))
    return found


def test_streams() -> None:
    seeds = [
        ANTHROPIC_STREAM,
        RESPONSES_STREAM,
        CHAT_STREAM,
        KEY.encode(),
        b"data: {}\r\n\r\n",
        b"data\n\ndata:x\r\r",
    ]
    tokens = [
        b"\n",
        b"\r",
        b"\n\n",
        b"\r\n\r\n",
        b"data:",
        b"data: ",
        b'"usage":',
        b'"usage":{"input_tokens":1e999}',
        b"[" * 50,
        KEY.encode(),
        b'"usage":{"input_tokens":' + b"9" * 5000 + b"}",
        b"\xff",
        b"null",
        b"-1",
        b"true",
    ]

    def check(example: tuple[bytes, list[bytes]]) -> None:
        data, parts = example
        parser = SseParser()
        found = [event for part in parts for event in parser.feed(part)]
        # A carriage return at the very end waits for what may follow.
        assert found in (events_of(data), events_of(data.removesuffix(b"\r")))
        totals = []
        for pieces in ([data], parts):
            for kind in ("text/event-stream", "application/json"):
                meter = Meter(kind)
                for piece in pieces:
                    meter.feed(piece)
                    assert min(vars(meter.so_far).values()) >= 0
                meter.finish()
                total = meter.total(len(data))
                assert total.cache_write_1h <= total.cache_write
                totals.append((total, meter.model, meter.metered))
        assert totals[:2] == totals[2:]
        mask = KeyMask(KEY, TOKEN)
        masked = b"".join(map(mask.feed, parts)) + mask.finish()
        assert masked == data.replace(KEY.encode(), b"*" * len(KEY)).replace(
            TOKEN.encode(), b"*" * len(TOKEN)
        )
        before = b""
        for part in parts:
            if (cut := _cut(before[-3:], part)) is not None:
                assert (before + part[:cut]).endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
            elif before:
                assert not re.search(rb"\n\n|\r\r|\r\n\r\n", part)
            before += part

    fuzz(with_cuts(mutated(seeds, tokens)), check)


# --- answers of upstreams ---


def parsed(pieces: Sequence[bytes], *, bodiless: bool) -> AnswerParser:
    parser = AnswerParser(bodiless=bodiless)
    for piece in pieces:
        if piece and not parser.complete and parser.failure is None:
            parser.feed(piece)
    if not parser.complete and parser.failure is None:
        parser.end()
    return parser


def body_of(parser: AnswerParser) -> bytes:
    return b"".join(iter(parser.piece, b""))


def tamed(data: bytes) -> bytes:
    """Without what llhttp takes, h11 does not, and goes no further: empty lines before a head, and odd reasons."""
    data = re.sub(rb"(\A|(?<=\r\n\r\n))[\r\n]+(?=HTTP/)", b"", data)
    return re.sub(rb"(?<=HTTP/1\.[01] \d\d\d )[^\r\n]+", b"X", data)


def second_opinion(data: bytes, *, bodiless: bool) -> tuple[int, bytes] | None:
    """Status and body as h11 reads them; None when it does not."""
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method="HEAD" if bodiless else "GET", target="/", headers=[("host", "x")]))
    http.send(h11.EndOfMessage())
    http.receive_data(data)
    status, body = 0, b""
    try:
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(b"")
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None


ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n2;a=b\r\n!!\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\nuntil the end",
    b"HTTP/1.0 404 No\r\nServer: x\r\n\r\nno",
    b"HTTP/1.1 100 Go on\r\n\r\nHTTP/1.1 204 Nothing\r\nA: b\r\n\r\n",
    b"HTTP/1.1 304 Not\r\nContent-Length: 5\r\n\r\n",
]
ANSWER_TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"1", b"5", b"-", b"+", b"ff", b"\r\n\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: 2\r\n", b"Transfer-Encoding: chunked\r\n", b"chunked", b"identity",
    b"gzip, ", b"HTTP/1.1 ", b"HTTP/1.0 ", b"101", b"204", b"100", b"Connection: close\r\n", b"Upgrade: x\r\n", b"\xff",
]  # fmt: skip


def test_answers() -> None:
    """However they are cut they mean the same, and what passes means the same to h11."""

    def check(example: tuple[tuple[bytes, list[bytes]], bool]) -> None:
        (whole, cut), bodiless = example
        one, other = parsed([whole], bodiless=bodiless), parsed(cut, bodiless=bodiless)
        assert (one.begun, one.complete, one.status) == (other.begun, other.complete, other.status)
        assert not one.begun or one.headers == other.headers
        body = body_of(one)
        assert body == body_of(other)
        if one.complete:
            assert second_opinion(whole, bodiless=bodiless) in {(one.status, body), None}
        plain = tamed(whole)
        third = parsed([plain], bodiless=bodiless)
        if third.complete:
            assert second_opinion(plain, bodiless=bodiless) == (third.status, body_of(third))

    fuzz(st.tuples(with_cuts(mutated(ANSWERS, ANSWER_TOKENS)), st.booleans()), check)
