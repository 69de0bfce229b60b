"""One request and its answer on their way through the gateway: what each kind of traffic has to say to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass

import h11

from taskyard.gateway.headers import Header
from taskyard.gateway.models import Refused
from taskyard.gateway.upstream import UpstreamRequest, UpstreamResponse


class RefusedError(Exception):
    """A request turned out bad while its body was read."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.refused = refused


@dataclass(frozen=True)
class Answer:
    """An answer of the gateway's own in place of the upstream's."""

    status: int
    body: bytes
    content_type: str
    refused: Refused | None = None
    """When it says no: what is told of it."""
    headers: tuple[Header, ...] = ()


class Exchange(ABC):
    """Made for each request that may pass."""

    name: str
    """The other side, in messages: "the anthropic API"."""
    upstream: str
    """Its address, for the server's log."""
    max_body: int | None = None
    """Bytes of the request."""
    stopped = False
    """Set by `feed`: the answer ends with what it returned."""

    @abstractmethod
    async def request(self, head: h11.Request, body: AsyncIterator[bytes] | None) -> UpstreamRequest | Answer:
        """What goes out. `body` comes as the client sends it; None: there is none. Raises RefusedError."""

    @abstractmethod
    def head(self, answer: UpstreamResponse) -> list[Header] | Answer:
        """The header of the answer as the agent gets it, or another answer in its place."""

    def feed(self, chunk: bytes) -> bytes:
        """What of the answer's next bytes goes on."""
        return chunk

    def finish(self) -> bytes:
        """What is still to be sent at the end of the answer."""
        return b""

    def ended(self, status: int, *, complete: bool, seconds: float) -> None:
        """The exchange is over, however. status: as the agent got it; 499 when it left before."""
        return

    def masked(self, text: str) -> str:
        """A text for the server's log without this exchange's secrets."""
        return text


def length(head: h11.Request) -> int:
    """The declared length of the body; 0 when none is declared."""
    return max((int(value) for name, value in head.headers if name == b"content-length"), default=0)


def has_body(head: h11.Request) -> bool:
    return length(head) > 0 or any(name == b"transfer-encoding" for name, _ in head.headers)


async def pieces(body: AsyncIterator[bytes] | None) -> AsyncIterator[bytes]:
    """The body, also when there is none."""
    if body is not None:
        async for chunk in body:
            yield chunk
