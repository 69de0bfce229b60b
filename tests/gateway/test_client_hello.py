"""The server name in the first message of TLS, as real clients send it."""

from __future__ import annotations

import ssl

import pytest

from taskyard.gateway.client_hello import MAX_HELLO, BadHelloError, HelloReader


def client_hello(name: str | None) -> bytes:
    """What a real client sends first."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def name_in(data: bytes) -> str | None:
    return HelloReader().feed(data)


def in_records(hello: bytes, size: int) -> bytes:
    """The same message in records of at most so many bytes."""
    message = hello[5:]
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(hello[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize("name", ["example.org", "xn--bcher-kva.example", "a" * 60 + ".example"])
def test_the_name(name: str) -> None:
    hello = client_hello(name)
    assert name_in(hello) == name
    assert name_in(in_records(hello, 7)) == name
    assert name_in(hello + b"\x14\x03\x03\x00\x01\x01\x17\x03\x03\x00\x01x") == name, "early data may follow"


def test_without_a_name() -> None:
    assert name_in(client_hello(None)) == ""


def test_more_is_needed_until_it_is_whole() -> None:
    hello = client_hello("example.org")
    assert [name_in(hello[:at]) for at in range(len(hello))] == [None] * len(hello)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_it_comes_in_pieces(size: int) -> None:
    hello, reader = in_records(client_hello("example.org"), size), HelloReader()
    assert [reader.feed(hello[at : at + 1]) for at in range(len(hello) - 1)] == [None] * (len(hello) - 1)
    assert reader.feed(hello[-1:]) == "example.org"


def extension(hello: bytes, kind: int, body: bytes) -> bytes:
    """The message with another extension at its end."""
    added = kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body
    at = 5 + 4 + 34
    at += 1 + hello[at]
    at += 2 + int.from_bytes(hello[at : at + 2], "big")
    at += 1 + hello[at]
    extensions = hello[at + 2 :] + added
    message = hello[9:at] + len(extensions).to_bytes(2, "big") + extensions
    handshake = b"\x01" + len(message).to_bytes(3, "big") + message
    return hello[:3] + len(handshake).to_bytes(2, "big") + handshake


def names(*entries: tuple[int, bytes]) -> bytes:
    listed = b"".join(bytes([kind]) + len(text).to_bytes(2, "big") + text for kind, text in entries)
    return len(listed).to_bytes(2, "big") + listed


@pytest.mark.parametrize(
    "hello",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"\x80\x2e\x01\x03\x01",
        b"\x16\x02\x00\x00\x01\x01",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x40\x01",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01" + (MAX_HELLO + 1).to_bytes(3, "big"),
        b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
        extension(client_hello("example.org"), 0, names((0, b"evil.example"))),
        extension(client_hello(None), 0, names((0, b"a.example"), (0, b"b.example"))),
        extension(client_hello(None), 0, names((1, b"a.example"))),
        extension(client_hello(None), 0, names((0, b"\xff.example"))),
        extension(client_hello(None), 0, b"\x00\xff"),
    ],
    ids=range(14),
)
def test_what_is_no_hello(hello: bytes) -> None:
    with pytest.raises(BadHelloError):
        name_in(hello)


def test_encrypted_client_hello_counts_by_its_outer_name() -> None:
    assert name_in(extension(client_hello("front.example"), 0xFE0D, b"\x00" * 40)) == "front.example"
