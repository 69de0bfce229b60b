"""A carrier in a pod, over the web socket of the API server's `exec`.

The first byte of a message names its stream: 0 to 2 as usual, 3 is the status at the end. That a web socket is
closed ends nothing in the pod by itself: the carrier ends because its standard input has ended, and kill()
makes sure of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from taskyard.sandbox.carrier import PIECE
from taskyard.sandbox.provider import Reason

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse

CLOSE_S = 2.0
"""The other end has this long to agree that the web socket is closed."""
LAST_S = 10.0
"""After the status, the last output has this long to come."""
_STDIN, _STDOUT, _STDERR, _STATUS = range(4)
_KILLED = 128 + 9
_NOT_STARTED = 126
"""The exit status of a command that the engine could not start, as a shell has it."""

PutDown = Callable[[], Awaitable[Reason]]
"""Makes sure that nothing of a command is left in the pod, and says what ended it."""


class PodWire:
    """See carried.Wire. put_down: see PutDown. on_end: called when nothing of the command runs any more."""

    def __init__(
        self, socket: ClientWebSocketResponse, put_down: PutDown, on_end: Callable[[], object]
    ) -> None:
        self._socket = socket
        self._put_down = put_down
        self._on_end: Callable[[], object] | None = on_end
        self.began = asyncio.Event()
        """Something has come from the carrier, or it has ended."""
        self._code: int | None = None
        """The exit status of the carrier, once it is known."""
        self._killed = self._broken = False
        self._ending: asyncio.Task[Reason] | None = None

    async def read(self) -> tuple[int, bytes] | None:
        """See carried.Wire. Raises OSError when the web socket ends without a status."""
        import aiohttp

        while True:
            try:
                async with asyncio.timeout(None if self._code is None else LAST_S):
                    message = await self._socket.receive()
            except TimeoutError:
                return None
            self.began.set()
            if message.type is aiohttp.WSMsgType.BINARY and message.data:
                stream, data = message.data[0], message.data[1:]
                if stream == _STATUS:
                    said = self._took_status(data)
                    if said:
                        return _STDERR, said
                elif stream in (_STDOUT, _STDERR) and data:
                    return stream, data
            elif message.type in (
                aiohttp.WSMsgType.CLOSE,
                aiohttp.WSMsgType.CLOSING,
                aiohttp.WSMsgType.CLOSED,
                aiohttp.WSMsgType.ERROR,
            ):
                if self._code is None and not self._killed:
                    self._broken = True
                    raise ConnectionAbortedError("the API server has closed it")
                return None

    async def write(self, data: bytes) -> None:
        """See carried.Wire."""
        for start in range(0, len(data), PIECE):
            await self._socket.send_bytes(bytes((_STDIN,)) + data[start : start + PIECE])

    async def kill(self) -> None:
        """See carried.Wire."""
        self._killed = True
        await self._end()

    async def end(self) -> tuple[int, Reason]:
        """See carried.Wire."""
        if self._code is not None and self._code < 128 and not self._killed:
            await self.close()
            self._ended()
            return self._code, "exited"
        # Something was killed: its own command, the carrier, or the whole pod.
        reason = await self._end()
        if self._code is None or (self._killed and not self._broken):
            return _KILLED, reason
        return self._code, reason

    async def _end(self) -> Reason:
        if self._ending is None:
            self._ending = asyncio.create_task(self._close_and_put_down(), name="end of a command in a pod")
        return await asyncio.shield(self._ending)

    async def _close_and_put_down(self) -> Reason:
        await self.close()
        try:
            return await self._put_down()
        finally:
            self._ended()

    def _ended(self) -> None:
        self.began.set()
        if self._on_end is not None:
            self._on_end()
            self._on_end = None

    async def close(self) -> None:
        """Close the web socket."""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_S):
                await self._socket.close()

    def _took_status(self, data: bytes) -> bytes:
        """Keep the exit status; why the command could not be started, in words."""
        try:
            status = json.loads(data)
            if status.get("status") == "Success":
                self._code = 0
                return b""
            if status.get("reason") == "NonZeroExitCode":
                causes = status["details"]["causes"]
                self._code = next(int(cause["message"]) for cause in causes if cause["reason"] == "ExitCode")
                return b""
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration):
            status = {}
        self._code = _NOT_STARTED
        return str(status.get("message") or "the API server gives no reason").encode()
