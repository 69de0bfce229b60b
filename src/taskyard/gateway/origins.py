"""Addresses of upstreams as the operator writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from taskyard.gateway.hosts import parse_authority

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Origin:
    """Where connections go."""

    scheme: Literal["http", "https"]
    host: str
    """A name in ASCII, or an address, without brackets."""
    port: int

    @property
    def authority(self) -> bytes:
        """As the header Host has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}").encode("ascii")


@dataclass(frozen=True)
class BaseUrl:
    """What the paths of requests are appended to."""

    origin: Origin
    path: bytes
    """Escaped, without a slash at its end."""


def parse_base_url(text: str) -> BaseUrl:
    """An http or https URL without user, password, query and fragment. Raises ValueError."""
    match = re.fullmatch(r"(?i:(https?))://([^/?#@\s]+)(/[^?#\x00-\x1f\x7f]*)?", text)
    if match is None:
        raise ValueError("it is no http or https URL, or has a user, password, query or fragment")
    scheme: Literal["http", "https"] = "https" if match[1].lower() == "https" else "http"
    host, port = parse_authority(match[2], _PORTS[scheme])
    path = quote((match[3] or "").rstrip("/"), safe="/%:@!$&'()*+,;=~")
    return BaseUrl(Origin(scheme, host.text, port), path.encode("ascii"))
