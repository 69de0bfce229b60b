"""Model traffic: which requests may pass, to where, with which headers.

The agent's base URLs are `http://127.0.0.1:3128/anthropic` and `http://127.0.0.1:3128/openai/v1`. What follows the
prefix is appended to the upstream's base URL as it stands. Credentials from inside are dropped and the real key is
added here, on the host.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from taskyard.errors import SetupError
from taskyard.gateway.headers import NOT_DOWN, NOT_UP, Header, framing, passed
from taskyard.gateway.origins import BaseUrl, parse_base_url
from taskyard.gateway.upstream import Timeouts, UpstreamRequest

# Seconds. A model that answers in one piece may think for minutes before the first byte.
TIMEOUTS = Timeouts(connect=20, read=900, write=60)

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

_CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key", b"cookie"})
# An encoded answer could not be counted.
_NOT_UP = NOT_UP | _CREDENTIALS | {b"accept-encoding"}
_NOT_DOWN = NOT_DOWN | {b"set-cookie"}
_FORM = frozenset({b"content-type", b"content-encoding"})

Auth = Literal["x-api-key", "bearer", "api-key", "none"]
"""How an upstream takes its key: in one of these headers, or not at all."""
_AUTH: dict[str, Auth] = {"anthropic": "x-api-key", "openai": "bearer"}


@dataclass(frozen=True)
class ModelRoute:
    """Where one API's traffic goes: the vendor, or anything that speaks like it (LiteLLM, Ollama, a cloud's).

    Raises SetupError for a base URL, key or header that cannot work; the text never shows a key.
    """

    base_url: str
    """`https://host[:port][/path]`, without `/v1`."""
    api_key: str | Callable[[], str | None] | None = field(default=None, repr=False)
    """A function is asked for each request: keys of some clouds live for an hour."""
    auth: Auth | None = None
    """None: as the API's vendor has it."""
    version: str = "/v1"
    """What the upstream has in place of `/v1`; may be empty."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Set on each request, over what the agent sent."""
    query: str = field(default="", repr=False)
    """Added to each request's query, such as `api-version=…`."""

    def __post_init__(self) -> None:
        try:
            parse_base_url(self.base_url)
        except ValueError:
            raise SetupError(
                "The base URL of a model API must look like https://host/path, without user, password, query or "
                "fragment: correct TASKYARD_MODELS__<API>__BASE_URL."
            ) from None
        if isinstance(self.api_key, str) and not _is_key(self.api_key):
            raise SetupError(_BAD_KEY)
        for name, value in self.headers.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not re.fullmatch(r"[\x20-\x7e]+", value):
                raise SetupError(
                    f"The header '{name}' of a model API has a name or a value that no header can have: correct "
                    "TASKYARD_MODELS__<API>__HEADERS."
                )
        if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", self.version) or not re.fullmatch(
            r"[A-Za-z0-9._~%=&-]*", self.query
        ):
            raise SetupError(
                "The version of a model API looks like /v1 and its query like name=value: correct "
                "TASKYARD_MODELS__<API>__VERSION or __QUERY."
            )

    @functools.cached_property
    def url(self) -> BaseUrl:
        return parse_base_url(self.base_url)

    @property
    def secret_headers(self) -> tuple[str, ...]:
        """Values of `headers` that look like credentials by their name."""
        return tuple(
            value
            for name, value in self.headers.items()
            if len(value) >= 8 and re.search(r"(?i)auth|key|token|secret", name)
        )

    def key(self) -> str | None:
        """The key right now. Raises SetupError."""
        key = self.api_key() if callable(self.api_key) else self.api_key
        if key is not None and not _is_key(key):
            raise SetupError(_BAD_KEY)
        return key

    def target(self, rest: str) -> bytes:
        """The request target at the upstream for a path of the API, which may have a query."""
        path, mark, query = rest.partition("?")
        if path.startswith("/v1/"):
            path = self.version + path.removeprefix("/v1")
        query = "&".join(part for part in (query, self.query) if part)
        return self.url.path + path.encode("ascii") + (b"?" + query.encode("ascii") if mark or query else b"")


_BAD_KEY = (
    "The API key of a model API is empty or holds spaces or other characters that no key has: look for a line break or "
    "quotation marks around it."
)


def _is_key(text: str) -> bool:
    return re.fullmatch(r"[\x21-\x7e]+", text) is not None


@dataclass(frozen=True)
class Admitted:
    """A request that may go out."""

    provider: str
    route: ModelRoute
    endpoint: str
    """The path within the API, such as `/v1/messages`."""
    target: bytes
    """The request target for the upstream."""
    query: str
    """As the agent sent it."""
    costs: bool
    """It uses tokens, so it is counted."""
    key: str | None = field(default=None, repr=False)
    """The key that is added."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no answer may show."""
        return (() if self.key is None else (self.key,)) + self.route.secret_headers


@dataclass(frozen=True)
class Refused:
    """A request that may not; `message` is for the agent and its user."""

    status: int
    message: str
    allow: tuple[str, ...] = ()
    rule: str | None = None
    """See `Refusal.rule`."""
    code: str | None = None
    """A name for programs, in place of the status's usual one."""


def provider_of(target: str) -> str | None:
    """The API whose prefix the target carries."""
    head = target.partition("?")[0].split("/", 2)
    return head[1] if len(head) > 1 and head[0] == "" and head[1] in PROVIDERS else None


def admit(routes: Mapping[str, ModelRoute], method: str, target: str) -> Admitted | Refused:
    """Decide about one origin-form request by its head."""
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
    try:
        key = None if route is None else route.key()
    except (SetupError, OSError, UnicodeError):
        return Refused(502, f"the API key for {provider} cannot be read on this server; check its settings.")
    if route is None or (key is None and route.auth != "none"):
        return Refused(
            403,
            f"no API key for {provider} is configured on this server: set {KEY_VARIABLES[provider]}",
        )
    return Admitted(provider, route, path, route.target(rest), rest.partition("?")[2], costs, key)


def _starred(path: str) -> str:
    # Only plain names: no dots alone, no escapes, so that nothing climbs out of the path.
    head, _, name = path.rpartition("/")
    return f"{head}/*" if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@-]*", name) else path


def upstream_request(
    admitted: Admitted, method: str, headers: Iterable[Header], body: AsyncIterator[bytes] | bytes | None
) -> UpstreamRequest:
    """The request that goes out: hop-by-hop fields and credentials dropped, the key added.

    `body` None: the request has none. A length that the client gave is kept, else the body goes chunked. One that was
    read is JSON, and is said to be: an upstream that took it for a form could find another model in it.
    """
    headers, route = list(headers), admitted.route
    own = {name.lower().encode("ascii"): value.encode("ascii") for name, value in route.headers.items()}
    sent = passed(headers, _NOT_UP | own.keys() | (_FORM if isinstance(body, bytes) else set()))
    if isinstance(body, bytes):
        sent.append((b"content-type", b"application/json"))
    elif body is not None:
        sent += framing(headers)
    sent.append((b"accept-encoding", b"identity"))
    if admitted.key is not None:
        key = admitted.key.encode("ascii")
        match route.auth or _AUTH[admitted.provider]:
            case "bearer":
                sent.append((b"authorization", b"Bearer " + key))
            case "x-api-key" | "api-key" as name:
                sent.append((name.encode("ascii"), key))
    sent += own.items()
    return UpstreamRequest(method, route.url.origin, admitted.target, sent, body, TIMEOUTS)


def answer_headers(headers: Iterable[Header], *secrets: str) -> list[Header]:
    """The upstream's answer headers as the agent gets them."""
    return [(name, masked(value, *secrets)) for name, value in passed(headers, _NOT_DOWN)]


def masked(data: bytes, *secrets: str) -> bytes:
    """The same bytes with the secrets starred out, as long as before."""
    for secret in secrets:
        data = data.replace(secret.encode("ascii"), b"*" * len(secret))
    return data


class KeyMask:
    """Stars secrets out of a body that comes in chunks; holds back what may be the beginning of one."""

    def __init__(self, *secrets: str) -> None:
        self._secrets = secrets
        self._longest = max(map(len, secrets), default=1)
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        data = masked(self._held + chunk, *self._secrets)
        keep = min(len(data), self._longest - 1)
        self._held = data[len(data) - keep :] if keep else b""
        return data[: len(data) - keep]

    def finish(self) -> bytes:
        held, self._held = self._held, b""
        return held


_KINDS = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def error_body(provider: str | None, status: int, message: str, code: str | None = None) -> bytes:
    """An error as that API words it, so that its client shows the message."""
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = f"Taskyard: {message}"
    if provider == "anthropic":
        return json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": None, "code": code or kind}},
    ).encode()


def error_event(endpoint: str, message: str, code: str) -> bytes:
    """The same in the middle of a stream of server-sent events, which ends with it."""
    message = f"Taskyard: {message}"
    kind = _KINDS[403]
    if endpoint == "/v1/messages":
        error: dict[str, object] = {"type": "error", "error": {"type": kind, "message": message}}
        return b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"
    if endpoint.startswith("/v1/responses"):
        failed = {"status": "failed", "error": {"code": code, "message": message}}
        error = {"type": "response.failed", "response": failed}
        return b"event: response.failed\ndata: " + json.dumps(error).encode() + b"\n\n"
    error = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return b"data: " + json.dumps(error).encode() + b"\n\n"
