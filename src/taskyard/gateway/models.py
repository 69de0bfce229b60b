"""Model traffic: which requests may pass, to where, with which headers.

The agent's base URLs are `http://127.0.0.1:3128/anthropic` and `http://127.0.0.1:3128/openai/v1`. What follows the
prefix is appended to the upstream's base URL as it stands. Credentials from inside are dropped and the real key is
added here, on the host.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field

import httpx

from taskyard.errors import SetupError

Header = tuple[bytes, bytes]

# Seconds. A model that answers in one piece may think for minutes before the first byte.
TIMEOUT = httpx.Timeout(connect=20, read=900, write=60, pool=60)

KEY_VARIABLES = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}
PROVIDERS = tuple(KEY_VARIABLES)

# What an agent needs of each API, and no more: the key opens other things too (files and stored answers of the whole
# account, batches that no budget sees). "*" stands for one path segment. True: a call that costs tokens.
_ENDPOINTS: dict[str, dict[str, tuple[tuple[str, ...], bool]]] = {
    "anthropic": {
        "/v1/messages": (("POST",), True),
        "/v1/messages/count_tokens": (("POST",), False),
        "/v1/models": (("GET", "HEAD"), False),
        "/v1/models/*": (("GET", "HEAD"), False),
        "/api/hello": (("GET", "HEAD"), False),
    },
    "openai": {
        "/v1/responses": (("POST",), True),
        "/v1/responses/compact": (("POST",), True),
        "/v1/responses/input_tokens": (("POST",), False),
        "/v1/chat/completions": (("POST",), True),
        "/v1/models": (("GET", "HEAD"), False),
        "/v1/models/*": (("GET", "HEAD"), False),
    },
}

# RFC 9110 §7.6.1, and older names that mean the same.
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
_CREDENTIALS = frozenset({b"authorization", b"proxy-authorization", b"x-api-key", b"api-key", b"cookie"})
# `host` and the framing are set anew, `expect` is answered here, and an encoded answer could not be counted.
_NOT_UP = _HOP_BY_HOP | _CREDENTIALS | {b"host", b"content-length", b"expect", b"accept-encoding"}
_NOT_DOWN = _HOP_BY_HOP | {b"set-cookie", b"proxy-authenticate", b"alt-svc"}


@dataclass(frozen=True)
class ModelRoute:
    """Where one API's traffic goes.

    Raises SetupError for a base URL or a key that cannot work; the text never shows the key.
    """

    base_url: str
    """`https://host[:port][/path]`, without `/v1`."""
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in {"http", "https"} or not url.host or url.userinfo or url.query or url.fragment:
            raise SetupError(
                "The base URL of a model API must look like https://host/path, without user, password, query or "
                "fragment: correct TASKYARD_MODELS__<API>__BASE_URL."
            )
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise SetupError(
                "The API key of a model API is empty or holds spaces or other characters that no key has: look for "
                "a line break or quotation marks around it."
            )


@dataclass(frozen=True)
class Admitted:
    """A request that may go out."""

    provider: str
    route: ModelRoute
    endpoint: str
    """The path within the API, such as `/v1/messages`."""
    target: bytes
    """The request target for the upstream."""
    costs: bool
    """It uses tokens, so it is counted."""


@dataclass(frozen=True)
class Refused:
    """A request that may not; `message` is for the agent and its user."""

    status: int
    message: str
    allow: tuple[str, ...] = ()


def provider_of(target: str) -> str | None:
    """The API whose prefix the target carries."""
    head = target.partition("?")[0].split("/", 2)
    return head[1] if len(head) > 1 and head[0] == "" and head[1] in PROVIDERS else None


def admit(routes: Mapping[str, ModelRoute], method: str, target: str) -> Admitted | Refused:
    """Decide about one origin-form request by its head. Rules on budgets belong here.

    Rules on model names need the body: they belong where its first bytes are forwarded.
    """
    provider = provider_of(target)
    if provider is None:
        known = " and ".join(f"/{name}/" for name in PROVIDERS)
        return Refused(404, f"There is nothing here. This is the gateway of a sandbox; it serves {known}.")
    rest = target[len(provider) + 1 :]
    path = rest.partition("?")[0]
    found = _ENDPOINTS[provider].get(path) or _ENDPOINTS[provider].get(_starred(path))
    if found is None:
        return Refused(404, f"{path or '/'} of the {provider} API is not open to sandboxes.")
    methods, costs = found
    if method not in methods:
        return Refused(405, f"{path} takes {' or '.join(methods)}, not {method}.", methods)
    route = routes.get(provider)
    if route is None or route.api_key is None:
        return Refused(
            403,
            f"no API key for {provider} is configured on this server: set {KEY_VARIABLES[provider]}",
        )
    base = httpx.URL(route.base_url).raw_path.rstrip(b"/")
    return Admitted(provider, route, path, base + rest.encode("ascii"), costs)


def _starred(path: str) -> str:
    # Only plain names: no dots alone, no escapes, so that nothing climbs out of the path.
    head, _, name = path.rpartition("/")
    return f"{head}/*" if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@-]*", name) else path


def upstream_request(
    admitted: Admitted, method: str, headers: Iterable[Header], body: AsyncIterator[bytes] | None
) -> httpx.Request:
    """The request that goes out: hop-by-hop fields and credentials dropped, the key added.

    `body` None: the request has none. A length that the client gave is kept, else the body goes chunked.
    """
    headers = list(headers)
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    dropped = _NOT_UP | _named(headers)
    sent = [(name, value) for name, value in headers if name not in dropped]
    if body is not None and not chunked:
        # the HTTP parser has checked that it is one number
        sent += [(name, value) for name, value in headers if name == b"content-length"][:1]
    sent.append((b"accept-encoding", b"identity"))
    key = admitted.route.api_key or ""
    if admitted.provider == "anthropic":
        sent.append((b"x-api-key", key.encode("ascii")))
    else:
        sent.append((b"authorization", b"Bearer " + key.encode("ascii")))
    return httpx.Request(
        method,
        admitted.route.base_url,
        headers=sent,
        content=body,
        extensions={"target": admitted.target, "timeout": TIMEOUT.as_dict()},
    )


def answer_headers(headers: Iterable[Header], key: str | None) -> list[Header]:
    """The upstream's answer headers as the agent gets them."""
    headers = [(name.lower(), value) for name, value in headers]
    dropped = _NOT_DOWN | _named(headers)
    return [(name, masked(value, key)) for name, value in headers if name not in dropped]


def _named(headers: Iterable[Header]) -> frozenset[bytes]:
    """Names that a `Connection` header declares hop-by-hop."""
    return frozenset(
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    )


def masked(data: bytes, key: str | None) -> bytes:
    """The same bytes with the key starred out, as long as before."""
    return data.replace(key.encode("ascii"), b"*" * len(key)) if key else data


class KeyMask:
    """Stars the key out of a body that comes in chunks; holds back what may be its beginning."""

    def __init__(self, key: str | None) -> None:
        self._key = key
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        data = masked(self._held + chunk, self._key)
        keep = min(len(data), len(self._key or "") - 1) if self._key else 0
        self._held = data[len(data) - keep :] if keep else b""
        return data[: len(data) - keep]

    def finish(self) -> bytes:
        held, self._held = self._held, b""
        return held


def error_body(provider: str | None, status: int, message: str) -> bytes:
    """An error as that API words it, so that its client shows the message."""
    kinds = {
        400: "invalid_request_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
    }
    kind = kinds.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = f"Taskyard: {message}"
    if provider == "anthropic":
        return json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": None, "code": kind}},
    ).encode()
