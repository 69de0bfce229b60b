"""Answers of upstreams, from bytes to head and body. llhttp parses, in its strict mode, and what it lets pass and we
do not is refused here."""

from __future__ import annotations

from collections import deque

import httptools

from taskyard.gateway.headers import Header
from taskyard.gateway.wire import UpstreamError

MAX_HEAD = 100 * 1024
"""Bytes of an answer that are no body: its head, heads before it, and trailers."""
_TOO_LARGE = f"its headers exceed {MAX_HEAD} bytes"


class RemoteProtocolError(UpstreamError):
    """The other side does not speak HTTP, or ended in the middle."""


class AnswerParser:
    """Takes the bytes after one request. `bodiless`: the answer ends with its head, as that to HEAD does."""

    def __init__(self, *, bodiless: bool) -> None:
        self.status = 0
        self.headers: list[Header] = []
        """Names in lower case."""
        self.begun = False
        """The head is there."""
        self.complete = False
        self.reusable = False
        """The connection may be used again: the end of the answer is certain, and nothing came after it."""
        self.failure: RemoteProtocolError | None = None
        """Set where the bytes stop making sense; what came before counts."""
        self._parser = httptools.HttpResponseParser(self)
        self._bodiless = bodiless
        self._framed = False
        self._interim = False
        self._body: deque[bytes] = deque()
        self._fields = 0
        self._since_body = 0

    def feed(self, data: bytes) -> None:
        self._since_body += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("it switches to another protocol, for which nobody asked")
        except httptools.HttpParserError as error:
            self._fail(str(error.__context__ or error))
        if max(self._fields, self._since_body) > MAX_HEAD:
            self._fail(_TOO_LARGE)

    def end(self) -> None:
        """No bytes follow."""
        if self.failure is None and self.begun and not self._framed:
            self.complete = True
        elif not self.begun:
            self._fail("the connection was closed without an answer")
        else:
            self._fail("the connection was closed in the middle of the answer")

    def piece(self) -> bytes:
        """The next bytes of the body that are here; none when there are none."""
        return self._body.popleft() if self._body else b""

    def _fail(self, reason: str) -> None:
        self.reusable = False
        if self.failure is None:
            self.failure = RemoteProtocolError(reason)

    # --- called by the parser ---

    def on_message_begin(self) -> None:
        if self.complete:
            self.reusable = False  # an answer that nobody asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += len(name) + len(value) + 4
        name = name.lower()
        if not self.begun:
            self.headers.append((name, value.strip(b" \t")))
        elif name in (b"content-length", b"transfer-encoding"):  # other trailers end here
            raise ValueError("a trailer tells the length again")

    def on_headers_complete(self) -> None:
        if self.complete:
            return
        status, version = self._parser.get_status_code(), self._parser.get_http_version()
        if status < 100 or version not in ("1.0", "1.1"):
            raise ValueError(f"status {status} of HTTP/{version} is none")
        if self._fields > MAX_HEAD:
            raise ValueError(_TOO_LARGE)
        if status < 200:
            self._interim = True
            self.headers.clear()
            return
        encodings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if encodings not in ([], [b"chunked"]):
            raise ValueError("its Transfer-Encoding is not 'chunked' alone")
        if any(name == b"content-length" and len(value) > 20 for name, value in self.headers):
            raise ValueError("its Content-Length has more than 20 digits")
        self.status = status
        self._framed = bool(encodings) or any(name == b"content-length" for name, _ in self.headers)
        self.begun = True
        self.complete = self._bodiless

    def on_body(self, data: bytes) -> None:
        self._since_body = 0
        if not self.complete:
            self._body.append(data)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif not self.complete:
            self.complete = True
            self.reusable = self._parser.should_keep_alive() and self._parser.get_http_version() == "1.1"
