"""How a connection to an upstream is opened."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Sequence
from typing import Any

from taskyard.gateway.origins import Origin
from taskyard.gateway.wire import ConnectError, ConnectTimeoutError, Wire

ATTEMPT_S = 0.25
"""An address that has not answered for so long gets company by the next one (RFC 8305 §5)."""


async def dial(origin: Origin, context: ssl.SSLContext, seconds: float) -> Wire:
    """Connect, each step within `seconds`. Raises ConnectError and ConnectTimeoutError.

    A name is looked up; an address is connected to as it stands. With TLS the certificate has to be for `origin.host`.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
            connected = await _first(in_turn(found))
        tls = {"ssl": context, "server_hostname": origin.host} if origin.scheme == "https" else {}
        async with asyncio.timeout(seconds):
            _, wire = await loop.create_connection(Wire, sock=connected, **tls)  # type: ignore[call-overload]
    except TimeoutError:
        raise ConnectTimeoutError(f"no connection within {seconds:g} seconds") from None
    except OSError as error:
        raise ConnectError(str(error)) from error
    assert isinstance(wire, Wire)
    return wire


Found = tuple[Any, ...]
"""An entry of `getaddrinfo`."""


def in_turn(found: Sequence[Found]) -> list[Found]:
    """The addresses with their families taking turns, each family in its order: one of them may lead nowhere."""
    ranks: Counter[int] = Counter()
    ranked = []
    for entry in found:
        ranked.append((ranks[entry[0]], entry))
        ranks[entry[0]] += 1
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]


async def _first(found: Sequence[Found]) -> socket.socket:
    """A socket connected to whichever address answers first. Raises OSError, that of the last one that failed."""
    waiting, attempts = list(found), set[asyncio.Task[socket.socket]]()
    error: BaseException = OSError("the name has no address")
    try:
        while waiting or attempts:
            if waiting:
                attempts.add(asyncio.create_task(_connect(waiting.pop(0))))
            timeout = ATTEMPT_S if waiting else None
            done, attempts = await asyncio.wait(
                attempts, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            connected = []
            for attempt in done:
                if (failed := attempt.exception()) is None:
                    connected.append(attempt.result())
                else:
                    error = failed
            if connected:
                for late in connected[1:]:
                    late.close()
                return connected[0]
        raise error
    finally:
        for attempt in attempts:
            attempt.cancel()
        for ended in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(ended, socket.socket):
                ended.close()


async def _connect(entry: Found) -> socket.socket:
    family, kind, protocol, _, address = entry
    made = socket.socket(family, kind, protocol)
    try:
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(made, address)
    except BaseException:
        made.close()
        raise
    return made
