"""Which addresses are public, and that a name is resolved once."""

from __future__ import annotations

import asyncio
import socket
import threading
from ipaddress import ip_address
from typing import Any

import pytest

from taskyard.gateway.addresses import (
    RefusedAddressError,
    UnreachableError,
    is_metadata,
    is_own,
    is_public,
    resolve,
)
from taskyard.gateway.hosts import parse_host


@pytest.mark.parametrize(
    "text", ["1.1.1.1", "8.8.8.8", "140.82.112.3", "2606:4700::1111", "2a00:1450:4001::1"]
)
def test_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "169.254.170.2",
        "172.16.0.1",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:0:127.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::7f00:1",
        "64:ff9b:1::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


def test_public_addresses_in_another_form() -> None:
    assert is_public(ip_address("::ffff:1.1.1.1"))
    assert is_public(ip_address("64:ff9b::101:101"))


@pytest.mark.parametrize(
    "text",
    [
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::",
        "fe80::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
    ],
)
def test_what_no_operator_can_open(text: str) -> None:
    assert is_metadata(ip_address(text))


def test_own_addresses() -> None:
    assert is_own(ip_address("127.0.0.1"))
    assert not is_own(ip_address("8.8.8.8"))


class Names:
    """A name server: its answers in their order; the last one goes on."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def getaddrinfo(self, name: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        self.asked.append(name)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not answer:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, port)) for address in answer]


async def test_a_name_is_asked_once_and_only_public_addresses_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = Names(["1.1.1.1", "10.0.0.1", "1.1.1.1", "fe80::1%eth0"], ["169.254.169.254"])
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    found = await resolve(parse_host("rebind.example"), 443, asyncio.Semaphore(4), internal=False)
    assert [str(address) for address in found] == ["1.1.1.1"]
    assert names.asked == ["rebind.example."], "no search domain is tried"


@pytest.mark.parametrize(
    "answer", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
)
async def test_names_of_internal_addresses(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names([answer]).getaddrinfo)
    with pytest.raises(RefusedAddressError, match="the setting network"):
        await resolve(parse_host("listed.example"), 443, asyncio.Semaphore(4), internal=False)
    if is_metadata(ip_address(answer)):
        with pytest.raises(RefusedAddressError):
            await resolve(parse_host("listed.example"), 443, asyncio.Semaphore(4), internal=True)
    else:
        assert len(await resolve(parse_host("listed.example"), 443, asyncio.Semaphore(4), internal=True)) == 1


async def test_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names([]).getaddrinfo)
    with pytest.raises(UnreachableError, match="no such name"):
        await resolve(parse_host("nowhere.example"), 443, asyncio.Semaphore(4), internal=False)


async def test_addresses_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert await resolve(parse_host("1.1.1.1"), 443, asyncio.Semaphore(4), internal=False) == [
        ip_address("1.1.1.1")
    ]
    with pytest.raises(RefusedAddressError):
        await resolve(parse_host("127.0.0.1"), 443, asyncio.Semaphore(4), internal=False)


async def test_a_place_is_held_as_long_as_the_name_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the answer any more, but its thread is still taken."""
    answer, lookups = threading.Event(), asyncio.Semaphore(1)

    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        assert answer.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("taskyard.gateway.addresses.RESOLVE_S", 0.05)
    with pytest.raises(UnreachableError, match="did not answer"):
        await resolve(parse_host("slow.example"), 443, lookups, internal=False)
    assert lookups.locked()
    answer.set()
    async with asyncio.timeout(60):
        await lookups.acquire()
