"""What goes wrong for a client. `str(error)` is for a person to read."""

from __future__ import annotations

import json
from typing import Any

import httpx


class ClientError(Exception):
    """A request failed: `status` of the HTTP answer (0 when there was none), `code` and `detail` (tasks-api §1.4).

    `retry_after_s`: seconds after which the server wants to be asked again; 0 when it did not say.
    """

    def __init__(self, status: int, code: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s


class UnreachableError(ClientError):
    """The server did not answer."""

    def __init__(self, detail: str) -> None:
        super().__init__(0, "unreachable", detail)


class StreamLostError(UnreachableError):
    """A stream broke more often in a row than was allowed."""


def unreachable(url: str, error: httpx.HTTPError | httpx.InvalidURL | ValueError) -> UnreachableError:
    """The error for a request that got no answer."""
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | ValueError):
        return UnreachableError(f"{url!r} is not the URL of a server: {reason(error)}")
    return UnreachableError(f"cannot reach the server at {url}: {reason(error)}")


def reason(error: Exception) -> str:
    """A short cause of a transport error, for the middle of a sentence."""
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection within the time limit"
    if isinstance(error, httpx.TimeoutException):
        return "no answer within the time limit"
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return "the connection was cut"
    text = str(error).strip() or type(error).__name__
    # Connection errors say "All connection attempts failed" or carry an errno; the cause knows more.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, OSError) and cause.strerror:
            text = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return text


def refused(response: httpx.Response) -> ClientError:
    """The error for an answer that is not 2xx; its body has been read."""
    status = response.status_code
    if response.is_redirect:
        where = response.headers.get("location", "another address")
        return ClientError(
            status, "redirect", f"the server sends this request on to {where}: use that address"
        )
    body = _object(response.content)
    detail = _text(body.get("detail")) or _text(body.get("error"))
    if not detail:
        phrase = f"{status} {response.reason_phrase}".strip()
        detail = f"the server answered {phrase} without an explanation"
        return ClientError(status, "error", detail, _retry_after_s(response))
    if status == httpx.codes.NOT_FOUND:
        detail = f"{detail.rstrip('.')}: {response.request.url.path}"
    if attr := _text(body.get("attr")):
        detail = f"{attr}: {detail}"
    if isinstance(missing := body.get("missing_artifact_ids"), list):
        detail = f"{detail}: {', '.join(map(str, missing))}"
    return ClientError(status, _text(body.get("code")) or "error", detail, _retry_after_s(response))


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdecimal() else 0.0


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""
