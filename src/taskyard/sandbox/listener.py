"""The server's side of the door: gets the listening socket out of a sandbox and lets the command start."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from taskyard.sandbox import door
from taskyard.sandbox.provider import LISTENER, ListenerHandler, SandboxError

SOURCE = Path(door.__file__)
START_S = 60.0


class EndedError(SandboxError):
    """The sandbox has ended, or is about to, before its command began."""


async def open_door(channel: socket.socket, handler: ListenerHandler) -> None:
    """Receive the listener that door.py sends through `channel`, hand it over, and let the command begin.

    Raises EndedError when the sandbox ends before that, SandboxError when nothing comes within START_S.
    """
    try:
        async with asyncio.timeout(START_S):
            listener = await _receive(channel)
    except TimeoutError:
        raise SandboxError(f"the sandbox has not opened its listener for {START_S:g} seconds") from None
    await handler(listener)
    try:
        channel.send(b"G")
    except OSError as error:
        raise EndedError("the sandbox ended before its command began") from error


async def _receive(channel: socket.socket) -> socket.socket:
    loop = asyncio.get_running_loop()
    received: asyncio.Future[socket.socket] = loop.create_future()

    def ready() -> None:
        try:
            listener = _listener(channel)
        except BlockingIOError:
            return
        except (OSError, SandboxError) as error:
            if not received.done():
                received.set_exception(error)
            return
        if received.done():
            listener.close()
        else:
            received.set_result(listener)

    channel.setblocking(False)
    loop.add_reader(channel.fileno(), ready)
    try:
        return await received
    except asyncio.CancelledError:
        if received.done() and not received.cancelled() and received.exception() is None:
            received.result().close()
        raise
    finally:
        loop.remove_reader(channel.fileno())


def _listener(channel: socket.socket) -> socket.socket:
    message, descriptors, _, _ = socket.recv_fds(channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    if len(sockets) != 1 or message != b"L":
        _close(sockets)
        raise EndedError("the sandbox ended before its listener was open")
    listener = sockets[0]
    # Checked although only our own program can have sent it.
    if listener.family != socket.AF_INET or listener.getsockname() != LISTENER:
        _close(sockets)
        raise SandboxError("what came out of the sandbox is not its listener")
    listener.setblocking(False)
    return listener


def _close(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()
