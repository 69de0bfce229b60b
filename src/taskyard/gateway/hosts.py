"""Host names: their one normal form, and rules such as `*.example.org` or `example.org:8443`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import idna

Address = IPv4Address | IPv6Address

PORTS = frozenset({443, 80, 22})
"""What a rule without a port allows (run-lifecycle §5.3)."""
MAX_RULES = 1000

# Underscores are in no host name of the standard, and in many that exist.
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class BadHostError(ValueError):
    """Not a host; the text is for people."""


@dataclass(frozen=True)
class Host:
    """A host in its normal form: a name in lower case ASCII without a dot at its end, or an address."""

    text: str
    address: Address | None = None

    @property
    def bracketed(self) -> str:
        """As it stands in a URL."""
        return f"[{self.text}]" if isinstance(self.address, IPv6Address) else self.text


def parse_host(text: str) -> Host:
    """The host that a request or a rule names. Raises BadHostError.

    Names are encoded by IDNA 2008 with the mapping of UTS #46. What some programs read as an address although it is
    not written as one (`127.1`, `0x7f.1`, `2130706433`) is refused, and so is anything escaped.
    """
    if text.startswith("[") and text.endswith("]"):
        return _address(text[1:-1], IPv6Address)
    name = text.removesuffix(".")
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise BadHostError("it is no valid international host name") from None
    name = name.lower()
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _address(name, IPv4Address)
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadHostError("it is no valid host name")
    return Host(name)


def _address(text: str, kind: type[Address]) -> Host:
    try:
        address = ip_address(text)
    except ValueError:
        address = None
    if not isinstance(address, kind) or "%" in text:
        raise BadHostError("it is no valid address")
    return Host(str(address), address)


def parse_authority(text: str, default_port: int | None = None) -> tuple[Host, int]:
    """`host:port`; the port may be missing when there is a default. Raises BadHostError."""
    name, colon, number = text.rpartition(":") if re.search(r":[^\]:]*$", text) else (text, "", "")
    if colon and not (number.isascii() and number.isdigit() and len(number) <= 5):
        raise BadHostError("its port is no number")
    if not colon and default_port is None:
        raise BadHostError("it has no port")
    port = int(number) if colon else default_port
    assert port is not None
    if not 0 < port < 65536:
        raise BadHostError("its port is out of range")
    return parse_host(name), port


class HostRules:
    """A list of hosts that something is allowed for.

    A rule is a name, an address, or `*.` and a name, which stands for every name below it and not for itself. It may
    end with a port; without one it allows `ports`, or every port when that is None. What cannot be read allows
    nothing and is kept in `ignored`.
    """

    def __init__(self, rules: Iterable[str], ports: frozenset[int] | None = PORTS) -> None:
        self.ignored: list[str] = []
        self._ports = ports
        self._exact: dict[str, set[int] | None] = {}
        self._below: dict[str, set[int] | None] = {}
        for number, rule in enumerate(rules):
            if number >= MAX_RULES or not self._add(rule.strip()):
                self.ignored.append(rule)

    def _add(self, rule: str) -> bool:
        wild = rule.startswith("*.")
        try:
            host, port = parse_authority(rule[2:] if wild else rule, 65535)
        except BadHostError:
            return False
        if wild and (host.address is not None or "." not in host.text):
            return False  # `*.com` would be half of the world
        ports = {port} if re.search(r":[0-9]+$", rule) else self._ports
        table = self._below if wild else self._exact
        known = table.setdefault(host.text, set())
        table[host.text] = None if ports is None or known is None else known | set(ports)
        return True

    def __len__(self) -> int:
        return len(self._exact) + len(self._below)

    def allow(self, host: Host, port: int) -> bool:
        if _has(self._exact, host.text, port):
            return True
        if host.address is not None:
            return False
        rest = host.text
        while rest := rest.partition(".")[2]:
            if _has(self._below, rest, port):
                return True
        return False


def _has(table: dict[str, set[int] | None], name: str, port: int) -> bool:
    ports = table.get(name, ())
    return ports is None or port in ports
