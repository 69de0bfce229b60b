"""One connection to an upstream: its bytes both ways, with bounds on time and memory."""

from __future__ import annotations

import asyncio
import select
from collections import deque
from typing import cast

from taskyard.gateway.batch import Batch

MAX_UNREAD = 64 * 1024
"""With more bytes than this waiting to be read, the other side has to wait; one read of the socket comes on top."""


class UpstreamError(Exception):
    """The other side failed; the text is for the server's log."""


class ConnectError(UpstreamError):
    """No connection, or no TLS with the right server."""


class ConnectTimeoutError(UpstreamError):
    pass


class ReadError(UpstreamError):
    """The connection broke."""


class ReadTimeoutError(UpstreamError):
    pass


class WriteTimeoutError(UpstreamError):
    pass


class Wire(asyncio.Protocol):
    """A connection, for one task at a time."""

    def __init__(self) -> None:
        self.ended = False
        """The other side sends no more."""
        self.lost = False
        """Nothing can be sent either."""
        self.full = False
        """What was written has not left yet: wait for a `change` before more is."""
        self.touched = False
        """Bytes have come since this was last set to False."""
        self._transport: asyncio.Transport
        self._batch: Batch
        self._unread: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Takes all of it at once; after `lost` it goes nowhere."""
        self._batch.write(data)

    async def read(self, seconds: float) -> bytes:
        """The next bytes; none at the end. Raises ReadError and ReadTimeoutError."""
        while not self._unread:
            if self._error is not None:
                raise ReadError(str(self._error)) from self._error
            if self.ended:
                return b""
            try:
                await self.change(seconds)
            except TimeoutError:
                raise ReadTimeoutError(f"nothing came for {seconds:g} seconds") from None
        return self.take()

    def take(self) -> bytes:
        """The next bytes that are here already; none when there are none."""
        if not self._unread:
            return b""
        data = self._unread.popleft()
        self._size -= len(data)
        if self._paused and self._size <= MAX_UNREAD:
            self._paused = False
            if not self.lost:
                self._transport.resume_reading()
        return data

    async def change(self, seconds: float) -> None:
        """Wait until something happens: bytes, an end, or room for more. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        timer = loop.call_later(seconds, _expire, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    @property
    def quiet(self) -> bool:
        """Whether it is open and nothing has come that was not read, neither here nor to the kernel."""
        if self._unread or self.ended or self.full or self._transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def abort(self) -> None:
        """End it at once, whatever is under way."""
        self._transport.abort()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no common class
        self._batch = Batch(self._transport)

    def data_received(self, data: bytes) -> None:
        self.touched = True
        self._unread.append(data)
        self._size += len(data)
        if self._size > MAX_UNREAD and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self.ended = True
        self._wake()
        # What is still to be sent may be sent, except with TLS, which has no half of a connection.
        return self._transport.get_extra_info("ssl_object") is None

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = self.lost = True
        self._error = exc
        self._wake()

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
