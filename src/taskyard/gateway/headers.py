"""Header fields on their way through: what ends at a proxy and what goes on."""

from __future__ import annotations

from collections.abc import Iterable

Header = tuple[bytes, bytes]

# RFC 9110 §7.6.1, and older names that mean the same.
HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
NOT_UP = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"proxy-authorization"}
"""`host` and the framing are set anew, `expect` is answered by the gateway."""
NOT_DOWN = HOP_BY_HOP | {b"proxy-authenticate", b"alt-svc"}


def passed(headers: Iterable[Header], dropped: frozenset[bytes]) -> list[Header]:
    """The fields that go on, names in lower case: without `dropped`, and what `Connection` declares hop-by-hop."""
    lower = [(name.lower(), value) for name, value in headers]
    dropped |= _named(lower)
    return [(name, value) for name, value in lower if name not in dropped]


def framing(headers: Iterable[Header]) -> list[Header]:
    """The length that a request gave, when it is not chunked: the parser has checked that it is one number."""
    headers = list(headers)
    if any(name == b"transfer-encoding" for name, _ in headers):
        return []
    return [(name, value) for name, value in headers if name == b"content-length"][:1]


def _named(headers: Iterable[Header]) -> frozenset[bytes]:
    return frozenset(
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    )
