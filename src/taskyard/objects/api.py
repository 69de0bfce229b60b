"""The HTTP side of the local store: signed forms come in, signed URLs give objects out. No other credentials."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from urllib.parse import unquote
from xml.sax.saxutils import escape

from litestar import Request, Response, get, post
from litestar.exceptions import HTTPException
from litestar.response import Stream

from taskyard.errors import NotFoundError
from taskyard.objects.forms import RefusedError
from taskyard.objects.interface import StorageError, media_type
from taskyard.objects.local import ROUTE, LocalStore, OpenFile, chunks
from taskyard.objects.uploads import receive

Req = Request[Any, Any, Any]

UPLOAD_S = 3600
"""An upload that takes longer is broken off: what it belongs to may be gone by then."""
SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
"""People's files come from the server's own address: no browser may run them as a part of it."""


@post(ROUTE, request_max_body_size=None)
async def upload(request: Req) -> Response[bytes]:
    """Take a signed form: 204 when the file is stored."""
    store = local_store(request)
    try:
        async with asyncio.timeout(UPLOAD_S):
            await receive(store, request.headers.get("content-type", ""), pieces(request))
    except TimeoutError:
        return xml_error(RefusedError(400, "RequestTimeout", "The upload took too long."))
    except RefusedError as error:
        return xml_error(error)
    except StorageError as error:
        return xml_error(RefusedError(503, "ServiceUnavailable", error.detail))
    return Response(b"", status_code=204)


@get(ROUTE + "/{key:path}")
async def download(request: Req) -> Response[Any]:
    """Give an object to whoever has its signed URL; one range of it when asked."""
    store = local_store(request)
    # As the client wrote it: the framework's own idea of the path is tidied up.
    raw = request.scope["raw_path"].partition(b"?")[0].decode("ascii", "replace")
    key, query = unquote(raw).removeprefix(ROUTE + "/"), dict(request.query_params)
    try:
        store.signer.check_query(key, query)
        opened = await store.open_file(key)
    except RefusedError as error:
        return xml_error(error)
    except StorageError as error:
        return xml_error(RefusedError(503, "ServiceUnavailable", error.detail))
    if opened is None:
        return xml_error(RefusedError(404, "NoSuchKey", "The specified key does not exist."))
    return serve(opened, request, query)


def serve(opened: OpenFile, request: Req, query: dict[str, str]) -> Response[Any]:
    """An open object as the answer to a request."""
    headers = SAFE | {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private",
        "Content-Type": media_type(query.get("response-content-type") or opened.content_type),
        "ETag": opened.tag,
    }
    if disposition := query.get("response-content-disposition"):
        headers["Content-Disposition"] = disposition
    wanted = None
    if request.headers.get("if-range") in (None, opened.tag):
        wanted = byte_range(request.headers.get("range", ""), opened.size)
    first, last = wanted or (0, opened.size - 1)
    if wanted is not None and first > last:
        opened.file.close()
        error = RefusedError(416, "InvalidRange", "The requested range is not satisfiable.")
        return xml_error(error, {"Content-Range": f"bytes */{opened.size}"})
    if wanted is not None:
        headers["Content-Range"] = f"bytes {first}-{last}/{opened.size}"
    headers["Content-Length"] = str(last - first + 1)
    return Stream(part(opened, first, last), status_code=206 if wanted else 200, headers=headers)


async def part(opened: OpenFile, first: int, last: int) -> AsyncGenerator[bytes, None]:
    """The bytes from the first to the last one."""
    with opened.file:
        opened.file.seek(opened.start + first)
        async for chunk in chunks(opened.file, last - first + 1):
            yield chunk


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a Range of one part, the first above the last when there are none such.

    None for anything else, which is answered whole (RFC 9110 §14.2).
    """
    found = re.fullmatch(r"bytes=(\d{0,15})-(\d{0,15})", header.strip(), re.ASCII)
    if found is None or found.groups() == ("", ""):
        return None
    start, end = found.groups()
    if not start:
        # Without any bytes there is no last part of them either.
        return (max(size - int(end), 0), size - 1) if int(end) else (size, size - 1)
    if end and int(end) < int(start):
        return None
    return int(start), min(int(end) if end else size - 1, size - 1)


async def pieces(request: Req) -> AsyncIterator[bytes]:
    """The body of a request as it comes in."""
    try:
        async for piece in request.stream():
            yield piece
    except HTTPException as error:
        # The framework's word for a client that has gone: nobody reads the answer.
        raise RefusedError(400, "IncompleteBody", "The request ended before its body did.") from error


def local_store(request: Req) -> LocalStore:
    store = request.app.state.objects
    if not isinstance(store, LocalStore):
        raise NotFoundError
    return store


def xml_error(error: RefusedError, headers: dict[str, str] | None = None) -> Response[bytes]:
    """A refusal as S3 writes it."""
    text = f"<Error><Code>{error.code}</Code><Message>{escape(error.message)}</Message></Error>"
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
    return Response(body, status_code=error.status, media_type="application/xml", headers=headers)
