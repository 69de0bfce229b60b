"""Small helpers of the `api.py` files: bodies, ids, pages, answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from litestar import Request, Response

from taskyard.errors import NotFoundError
from taskyard.schemas import Body, parse

B = TypeVar("B", bound=Body)

DEFAULT_LIMIT = 50
MAX_LIMIT = 100

encode = msgspec.json.Encoder(uuid_format="canonical").encode


async def body(request: Request[Any, Any, Any], model: type[B]) -> B:
    """The parsed JSON body of a request."""
    return parse(model, request.headers.get("content-type", ""), await request.body())


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    """A JSON answer, encoded once."""
    return Response(encode(value), status_code=status, media_type="application/json", headers=headers)


async def begun(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same chunks, the first of which is made now: what fails at once is an error answer, not half an answer."""
    first = await anext(chunks, None)

    async def all_of_them() -> AsyncIterator[bytes]:
        if first is not None:
            yield first
        async for chunk in chunks:
            yield chunk

    return all_of_them()


def path_uuid(text: str) -> UUID:
    """An id out of a path; a malformed one names nothing, so it is not found (tasks-api §1.1)."""
    try:
        value = UUID(text)
    except ValueError:
        raise NotFoundError from None
    if len(text) != 36:
        raise NotFoundError
    return value


def origin_of(request: Request[Any, Any, Any]) -> str:
    """The server's own address as this client sees it, without a slash at the end."""
    if base_url := request.app.state.settings.base_url:
        return str(base_url).rstrip("/")
    host = request.headers.get("host")
    if host is None:  # HTTP/1.0
        return str(request.base_url).rstrip("/")
    return f"{request.scope['scheme']}://{host}{request.scope.get('root_path', '')}".rstrip("/")


def log_urls(request: Request[Any, Any, Any]) -> Callable[[str], str]:
    """Makes the signed `log_url` of a run id: absolute, valid without credentials (tasks-api §3)."""
    origin, signer = origin_of(request), request.app.state.signer
    return lambda run_id: f"{origin}/api/logs/{run_id}?{signer.query(f'log:{run_id}')}"


def limit_offset(request: Request[Any, Any, Any]) -> tuple[int, int]:
    """Paging parameters (tasks-api §1.5): wrong or missing ones take the default, large ones are cut."""
    limit = _number(request.query_params.get("limit"), 1) or DEFAULT_LIMIT
    return min(limit, MAX_LIMIT), _number(request.query_params.get("offset"), 0) or 0


def _number(text: str | None, least: int) -> int | None:
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 15:
        return None
    number = int(text)
    return number if number >= least else None


def page(
    request: Request[Any, Any, Any], origin: str, results: list[Any], count: int, limit: int, offset: int
) -> Response[bytes]:
    """One page of a list with absolute links that keep the other query parameters."""

    # As the client wrote it: the framework's own idea of the path has lost a slash at the end.
    path = request.scope["raw_path"].partition(b"?")[0].decode("ascii", "replace")

    def link(start: int) -> str:
        others = [(k, v) for k, v in request.query_params.multi_items() if k not in ("limit", "offset")]
        query = [*others, ("limit", str(limit)), *([("offset", str(start))] if start else [])]
        return f"{origin}{path}?{urlencode(query)}"

    return answer(
        {
            "count": count,
            "next": link(offset + limit) if offset + limit < count else None,
            "previous": link(max(offset - limit, 0)) if offset > 0 else None,
            "results": results,
        }
    )
