"""From a host to addresses that may be connected to: resolved once, and what was checked is what is used."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from taskyard.gateway.hosts import Address, Host

RESOLVE_S = 15.0
CONNECT_S = 20.0
MAX_ADDRESSES = 4
"""So many of a host's addresses are tried."""

# A pool of its own: a name server that does not answer must not hold up anything else of the worker.
_RESOLVERS = ThreadPoolExecutor(64, "resolve")

# Not 64:ff9b:1::/48, the one for local use (RFC 8215): each network says itself where the IPv4 address stands in it.
_NAT64 = IPv6Network("64:ff9b::/96")
_6TO4 = IPv6Network("2002::/16")
_UNICAST = IPv6Network("2000::/3")
# What `is_global` of the oldest supported Python lets through, and addresses of clouds' own services that look public:
# Azure's wire server, Oracle's metadata (RFC 6890 192.0.0.0/24), 6to4 relays, documentation.
_REFUSED = tuple(
    ip_network(text)
    for text in ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "2001::/23", "fec0::/10")
)


class UnreachableError(Exception):
    """No connection; the text is for people, after the host's name."""


class RefusedAddressError(Exception):
    """The host has no address that a sandbox may reach; the text is for people, after the host's name."""


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, whatever it is wrapped in.

    Not so: loopback, private, link-local (all metadata services), shared, multicast and reserved ones, and IPv6
    forms of them (mapped, 6to4, NAT64).
    """
    if isinstance(address, IPv6Address):
        inner = embedded(address)
        if inner is not None:
            return is_public(inner)
        if address not in _UNICAST:
            return False
    if address.is_multicast or address.is_reserved or not address.is_global:
        return False
    return not any(address.version == network.version and address in network for network in _REFUSED)


def embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _6TO4:
        return address.sixtofour
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def is_metadata(address: Address) -> bool:
    """Whether it is link-local, where clouds hand out credentials, or no address of one host at all.

    These are not opened even for hosts that the operator names.
    """
    if isinstance(address, IPv6Address) and (inner := embedded(address)) is not None:
        return is_metadata(inner)
    known = {"100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"}
    return address.is_link_local or address.is_multicast or address.is_unspecified or str(address) in known


def is_own(address: Address) -> bool:
    """Whether it is this machine's own address: services that listen on all of them do not expect a sandbox there."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        # Connecting a datagram socket sends nothing; it only asks which address would be the source.
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.connect((str(address), 9))
            return ip_address(probe.getsockname()[0].partition("%")[0]) == address
    except OSError:
        return False  # no route there at all


async def resolve(host: Host, port: int, lookups: asyncio.Semaphore, *, internal: bool) -> list[Address]:
    """The addresses of a host that may be connected to. `internal`: the operator has named it.

    lookups: holds a place as long as a name is asked for, also when nobody waits for the answer any more.

    Raises UnreachableError and RefusedAddressError.
    """
    found = (
        [host.address] if host.address is not None else await _patiently(host.text, port, lookups, internal)
    )
    if internal:
        allowed = [address for address in found if not is_metadata(address)]
    else:
        allowed = [address for address in found if is_public(address) and not is_own(address)]
    if not allowed:
        raise RefusedAddressError(
            "is not on the public internet, and sandboxes do not reach internal addresses. An administrator of the "
            "server can name it in the setting network.internal_hosts"
        )
    return allowed[:MAX_ADDRESSES]


async def _patiently(name: str, port: int, lookups: asyncio.Semaphore, internal: bool) -> list[Address]:
    await lookups.acquire()
    asking = asyncio.create_task(_look_up(name, port, internal=internal), name="look up")
    asking.add_done_callback(lambda _: lookups.release())
    try:
        async with asyncio.timeout(RESOLVE_S):
            return await asyncio.shield(asking)  # its thread cannot be stopped
    except TimeoutError:
        raise UnreachableError("could not be resolved: the name server did not answer") from None
    except (OSError, UnicodeError):
        raise UnreachableError("could not be resolved: there is no such name, or no name server") from None


async def _look_up(name: str, port: int, *, internal: bool) -> list[Address]:
    def ask() -> Sequence[tuple[object, ...]]:
        # With a dot at its end no search domain of this machine is tried, nor its file of hosts.
        asked = name if internal else f"{name}."
        return socket.getaddrinfo(asked, port, type=socket.SOCK_STREAM)

    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, ask)
    addresses = dict.fromkeys(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)  # type: ignore[index]
    return list(addresses)


async def connect(
    addresses: Sequence[Address], port: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first of the addresses that answers. Raises UnreachableError."""
    reason = "the connection was refused"
    try:
        async with asyncio.timeout(CONNECT_S):
            for address in addresses:
                try:
                    async with asyncio.timeout(CONNECT_S / len(addresses)):
                        return await asyncio.open_connection(str(address), port)
                except TimeoutError:
                    reason = "it did not answer"
                except OSError as error:
                    reason = (error.strerror or "the connection failed").lower()
    except TimeoutError:
        reason = "it did not answer"
    raise UnreachableError(f"could not be reached on port {port}: {reason}")
