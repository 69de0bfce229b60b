"""Small writes that leave together: each system call wakes the other side, and costs more than what it carries."""

from __future__ import annotations

import asyncio

ENOUGH = 16 * 1024


class Batch:
    """Collects what one step of a task writes. It leaves when the task waits for something, or is enough."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._pieces:
            asyncio.get_running_loop().call_soon(self.flush)
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= ENOUGH:
            self.flush()

    def flush(self) -> None:
        """Hand over now what there is; it goes nowhere when the connection has ended."""
        if self._pieces and not self._transport.is_closing():
            self._transport.write(self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces))
        self._pieces.clear()
        self._size = 0
