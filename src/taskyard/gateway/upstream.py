"""The way out: HTTP/1.1 requests to upstreams, over connections that are kept for the next one.

It follows no redirect, uses no proxy, decodes nothing and stores nothing: a body goes on as it comes, both ways.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from taskyard.gateway.answer_parser import AnswerParser, RemoteProtocolError
from taskyard.gateway.dial import dial
from taskyard.gateway.headers import Header
from taskyard.gateway.origins import Origin
from taskyard.gateway.wire import ReadError, UpstreamError, Wire, WriteTimeoutError

MAX_IDLE = 8
"""Connections that are kept."""
IDLE_S = 5.0
"""For so long: common servers close theirs after as much."""

# Nothing that reached a header can end it: one more look than the parsers before have had.
_HEAD = re.compile(
    rb"[!#$%&'*+.^_`|~0-9A-Z-]+ [!-~]+ HTTP/1\.1\r\n([!#$%&'*+.^_`|~0-9A-Za-z-]+: [^\x00\r\n]*\r\n)+\r\n"
)


class LocalProtocolError(UpstreamError):
    """What was to be sent is no HTTP. The text quotes none of it."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds without progress."""

    connect: float
    read: float
    write: float


@dataclass(frozen=True)
class UpstreamRequest:
    """A request that goes out."""

    method: str
    origin: Origin
    target: bytes
    headers: Sequence[Header]
    """`host` is that of the origin if it is not among them. An iterated body without `content-length` goes chunked."""
    body: AsyncIterator[bytes] | bytes | None
    timeouts: Timeouts

    @property
    def length(self) -> int | None:
        """Bytes of the body; None: it goes chunked."""
        if self.body is None or isinstance(self.body, bytes):
            return len(self.body or b"")
        return next((int(value) for name, value in self.headers if name == b"content-length"), None)

    @property
    def repeatable(self) -> bool:
        """Whether it does no harm to send it twice (RFC 9110 §9.2.2)."""
        return self.body is None and self.method in {"GET", "HEAD", "OPTIONS"}

    def head(self) -> bytes:
        """The head as it is sent. Raises LocalProtocolError."""
        fields = [field for field in self.headers if field[0] != b"content-length"]
        if not any(name == b"host" for name, _ in fields):
            fields.insert(0, (b"host", self.origin.authority))
        if self.length is None:
            fields.append((b"transfer-encoding", b"chunked"))
        elif self.body is not None or self.method in {"POST", "PUT", "PATCH"}:
            fields.append((b"content-length", b"%d" % self.length))
        lines = [b"%b: %b\r\n" % field for field in fields]
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (self.method.encode("ascii"), self.target, b"".join(lines))
        if _HEAD.fullmatch(head) is None or head.count(b"\r\n") != len(lines) + 2:
            raise LocalProtocolError("a header of the request has a name or a value that no header can have")
        return head


class UpstreamResponse:
    """An answer; iterating gives its body as it comes. `close()` ends what is under way."""

    def __init__(self, wire: Wire, request: UpstreamRequest, upstream: Upstream) -> None:
        self._wire = wire
        self._request = request
        self._upstream = upstream
        self._parser = AnswerParser(bodiless=request.method in {"HEAD", "CONNECT"})
        self._sent = False
        self._closed = False

    @property
    def status(self) -> int:
        return self._parser.status

    @property
    def headers(self) -> list[Header]:
        """Names in lower case."""
        return self._parser.headers

    def header(self, name: bytes) -> str:
        """The values of a header, joined; empty without it."""
        return b", ".join(value for found, value in self.headers if found == name).decode("latin-1")

    async def begin(self) -> None:
        """Send the request and read the head. Raises UpstreamError."""
        await self._send()
        while not self._parser.begun:
            await self._read()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Raises UpstreamError when the answer ends before it should."""
        while True:
            while piece := self._parser.piece():
                yield piece
            if self._parser.complete:
                return
            await self._read()

    def close(self) -> None:
        """Idempotent. The connection is kept if the exchange was complete."""
        if self._closed:
            return
        self._closed = True
        if self._sent and self._parser.reusable:
            self._upstream.keep(self._request.origin, self._wire)
        else:
            self._wire.abort()

    async def _read(self) -> None:
        if self._parser.failure is not None:
            raise self._parser.failure
        if data := await self._wire.read(self._request.timeouts.read):
            self._parser.feed(data)
        else:
            self._parser.end()

    async def _send(self) -> None:
        body, length = self._request.body, self._request.length
        self._wire.write(self._request.head())
        if isinstance(body, bytes):
            self._wire.write(body)
        elif body is not None:
            sent = 0
            async for piece in body:
                if not piece:
                    continue  # in chunks it would be the end
                sent += len(piece)
                if length is not None and sent > length:
                    raise LocalProtocolError("the body is longer than its content-length")
                self._wire.write(piece if length is not None else b"%x\r\n%b\r\n" % (len(piece), piece))
                if not await self._room():
                    return
            if length is None:
                self._wire.write(b"0\r\n\r\n")
            elif sent < length:
                raise LocalProtocolError("the body is shorter than its content-length")
        self._sent = await self._room()

    async def _room(self) -> bool:
        """Wait until more can be sent; False when nobody wants it.

        An error that comes early is the answer (RFC 9112 §9.5). Another early answer is not: some servers send its
        head before they read the request.
        """
        wire, parser = self._wire, self._parser
        while True:
            while not parser.begun and parser.failure is None and (data := wire.take()):
                parser.feed(data)
            if wire.lost or parser.failure is not None or parser.status >= 400:
                return False
            if wire.ended and not parser.begun:
                return False
            if not wire.full:
                return True
            try:
                await wire.change(self._request.timeouts.write)
            except TimeoutError:
                seconds = self._request.timeouts.write
                raise WriteTimeoutError(f"nothing could be sent for {seconds:g} seconds") from None


class Upstream:
    """Sends requests. Callers bound how many are under way at once."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._idle: list[tuple[float, Origin, Wire]] = []
        self._closed = False

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """The answer's head as soon as it is there; `close()` the answer. Raises UpstreamError.

        A server may close a kept connection while the next request is on its way. That one is sent again if nothing
        has come back and it does no harm.
        """
        if (wire := self._kept(request.origin)) is not None:
            try:
                return await self._ask(wire, request)
            except (ReadError, RemoteProtocolError):
                if wire.touched or not request.repeatable:
                    raise
        wire = await dial(request.origin, self._context, request.timeouts.connect)
        return await self._ask(wire, request)

    async def _ask(self, wire: Wire, request: UpstreamRequest) -> UpstreamResponse:
        wire.touched = False
        response = UpstreamResponse(wire, request, self)
        try:
            await response.begin()
        except BaseException:
            wire.abort()
            raise
        return response

    def _kept(self, origin: Origin) -> Wire | None:
        self._drop_old()
        for index in reversed(range(len(self._idle))):
            _, kept_for, wire = self._idle[index]
            if kept_for == origin:
                del self._idle[index]
                if wire.quiet:
                    return wire
                wire.abort()
        return None

    def keep(self, origin: Origin, wire: Wire) -> None:
        """Take a connection back for the next request to the same origin."""
        self._idle.append((time.monotonic(), origin, wire))
        self._drop_old()

    def _drop_old(self) -> None:
        until = time.monotonic() - IDLE_S
        while self._idle and (self._closed or len(self._idle) > MAX_IDLE or self._idle[0][0] < until):
            self._idle.pop(0)[2].abort()

    def close(self) -> None:
        """End the kept connections, and keep no more."""
        self._closed = True
        self._drop_old()
