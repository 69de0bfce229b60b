"""Every expected failure is a small subclass of TaskyardError; its docstring is its default message.

The HTTP face of an error is the envelope of tasks-api §1.4: exactly `type`, `code`, `detail`, `attr`.
A failure that the contract answers with a hand-built body sets `body` instead.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar


class TaskyardError(Exception):
    """Something went wrong."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "error"
    attr: str | None = None
    headers: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        detail: str | None = None,
        *,
        code: str | None = None,
        attr: str | None = None,
        body: dict[str, Any] | None = None,
    ) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip().split("\n", maxsplit=1)[0]
        super().__init__(self.detail)
        if code is not None:
            self.code = code
        if attr is not None:
            self.attr = attr
        self.body = body

    def envelope(self) -> dict[str, Any]:
        """The JSON body of the HTTP answer."""
        if self.body is not None:
            return self.body
        return {"type": type(self).type, "code": self.code, "detail": self.detail, "attr": self.attr}

    def answer_headers(self) -> dict[str, str]:
        """The headers of the HTTP answer."""
        return dict(type(self).headers)


class InvalidInputError(TaskyardError):
    """Invalid input."""

    status = 400
    type = "validation_error"
    code = "invalid_input"


class NotAuthenticatedError(TaskyardError):
    """Authentication credentials were not provided."""

    status = 401
    type = "authentication_error"
    code = "not_authenticated"
    headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Bearer"}


class AuthenticationFailedError(NotAuthenticatedError):
    """Invalid API key: unknown, expired or revoked."""

    code = "authentication_failed"


class PermissionDeniedError(TaskyardError):
    """You do not have permission to perform this action."""

    status = 403
    type = "authentication_error"
    code = "permission_denied"


class NotFoundError(TaskyardError):
    """Not found."""

    status = 404
    type = "invalid_request"
    code = "not_found"


class MethodNotAllowedError(TaskyardError):
    """Method not allowed."""

    status = 405
    type = "invalid_request"
    code = "method_not_allowed"


class UnsupportedMediaTypeError(TaskyardError):
    """Unsupported media type in request: send application/json."""

    status = 415
    type = "invalid_request"
    code = "unsupported_media_type"


class ThrottledError(TaskyardError):
    """Request was throttled."""

    status = 429
    type = "throttled_error"
    code = "throttled"

    def __init__(self, seconds: float) -> None:
        """`seconds` from now the request may come again."""
        self.retry_after_s = max(math.ceil(seconds), 1)
        noun = "second" if self.retry_after_s == 1 else "seconds"
        super().__init__(f"Request was throttled. Expected available in {self.retry_after_s} {noun}.")

    def answer_headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class ServiceUnavailableError(TaskyardError):
    """The server cannot do this right now."""

    status = 503
    code = "unavailable"


class SetupError(TaskyardError):
    """The machine or the configuration lacks something that is needed.

    Raised at start and by commands, never by a request. `detail` says what is wrong and how to mend it.
    """

    code = "setup"
