"""The first message of TLS: which server name a client asks for, read before a byte of it goes out.

RFC 8446 §4.1.2 and §5.1, RFC 6066 §3. Encrypted Client Hello (ECH) passes when the name outside is the allowed host:
only that host's own front can read the name inside, which is what domain fronting always was.
"""

from __future__ import annotations

MAX_HELLO = 64 * 1024
_SERVER_NAME = 0


class BadHelloError(ValueError):
    """Not the beginning of TLS; the text is for people."""


class _Bytes:
    """Reads fields with a length in front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) < count:
            raise BadHelloError("its first message is cut short")
        self._at += count
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def field(self, size: int) -> bytes:
        return self.take(self.number(size))

    def __bool__(self) -> bool:
        return self._at < len(self._data)


class HelloReader:
    """Fed the first bytes of a connection until a TLS client has said which server it wants.

    Looks at each byte once, so that a client that sends them one by one, or in records of one byte, costs no more.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = 0  # where the next record begins
        self._message = bytearray()  # what the records before it carried

    @property
    def end(self) -> int:
        """How many of the bytes are the hello, once it is whole."""
        return self._at

    def feed(self, data: bytes) -> str | None:
        """The server name, "" when the client gives none; None: more bytes are needed. Raises BadHelloError."""
        self._data += data
        while not self._complete():
            record = bytes(self._data[self._at : self._at + 5])
            if record[:1] not in (b"", b"\x16") or record[1:2] not in (b"", b"\x03"):
                raise BadHelloError("it does not begin with TLS")
            if len(record) < 5:
                return None
            length = int.from_bytes(record[3:5], "big")
            if not 0 < length <= 2**14:
                raise BadHelloError("it does not begin with TLS")
            if len(self._data) < self._at + 5 + length:
                return None
            self._message += self._data[self._at + 5 : self._at + 5 + length]
            self._at += 5 + length
        return _server_name(bytes(self._message[4:]))

    def _complete(self) -> bool:
        """Whether the handshake message is there; whatever records follow it: early data, for one."""
        if not b"\x01".startswith(self._message[:1]):
            raise BadHelloError("it does not begin with a ClientHello")
        if len(self._message) < 4:
            return False
        size = int.from_bytes(self._message[1:4], "big")
        if size > MAX_HELLO:
            raise BadHelloError("its first message is too large")
        if len(self._message) > 4 + size:
            raise BadHelloError("there is something behind its first message")
        return len(self._message) == 4 + size


def _server_name(message: bytes) -> str:
    hello = _Bytes(message)
    hello.take(2 + 32)  # version, random
    hello.field(1)  # session
    hello.field(2)  # cipher suites
    hello.field(1)  # compression
    if not hello:
        return ""
    extensions, name = _Bytes(hello.field(2)), None
    while extensions:
        kind, body = extensions.number(2), extensions.field(2)
        if kind != _SERVER_NAME:
            continue
        if name is not None:
            raise BadHelloError("it names two servers")
        name = _name(body)
    if hello:
        raise BadHelloError("there is something behind its first message")
    return name or ""


def _name(body: bytes) -> str:
    names = _Bytes(_Bytes(body).field(2))
    kind, text = names.number(1), names.field(2)
    if kind != 0 or names:
        raise BadHelloError("it names something other than one host")
    try:
        return text.decode("ascii")
    except UnicodeDecodeError:
        raise BadHelloError("the server name is not ASCII") from None
