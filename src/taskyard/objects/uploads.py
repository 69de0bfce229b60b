"""Taking a form at the local store: multipart/form-data, all fields first and the file last, piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from taskyard.objects.forms import Allowed, RefusedError
from taskyard.objects.interface import media_type
from taskyard.objects.local import LocalStore, Upload

MAX_FIELD_BYTES = 20_000
"""All fields together, as at S3."""
MAX_PARTS = 100
MAX_PART_HEADER_BYTES = 8192


async def receive(store: LocalStore, content_type: str, body: AsyncIterator[bytes]) -> None:
    """Store the file of a form, holding no more of it than one piece. Raises RefusedError; then nothing is stored."""
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise RefusedError(
            412, "PreconditionFailed", "The form must be sent as multipart/form-data with a boundary."
        )
    try:
        parser = PushMultipartParser(
            options["boundary"], max_header_size=MAX_PART_HEADER_BYTES, max_segment_count=MAX_PARTS
        )
        async with AsyncExitStack() as stack:
            await _Form(store, stack).read(parser, body)
    except MultipartError as error:
        raise RefusedError(
            400, "MalformedPOSTRequest", f"This is no multipart/form-data: {error}."
        ) from error


class _Form:
    def __init__(self, store: LocalStore, stack: AsyncExitStack) -> None:
        self._store, self._stack = store, stack
        self._fields: dict[str, str] = {}
        self._field_bytes = 0
        self._name = ""
        self._value = bytearray()
        self._allowed: Allowed | None = None
        self._upload: Upload | None = None
        self._size = 0

    async def read(self, parser: PushMultipartParser, body: AsyncIterator[bytes]) -> None:
        """Read up to the end of the file; what follows it is ignored, as at S3."""
        async for piece in body:
            if not piece:
                break
            for event in parser.parse(piece):
                if isinstance(event, MultipartSegment):
                    await self._begin(event)
                elif event:
                    await self._take(bytes(event))
                elif await self._end():
                    return
            if parser.closed:
                break
        if self._upload is not None:
            raise RefusedError(400, "IncompleteBody", "The request ended before the file did.")
        raise RefusedError(400, "InvalidArgument", "POST requires exactly one file upload per request.")

    async def _begin(self, part: MultipartSegment) -> None:
        self._name = part.name or ""
        self._value.clear()
        if self._name != "file":
            return
        self._allowed = self._store.signer.check(self._fields)
        kind = self._allowed.content_type or media_type(part.header("Content-Type"))
        self._upload = await self._stack.enter_async_context(self._store.upload(self._allowed.key, kind))

    async def _take(self, data: bytes) -> None:
        if self._upload is None:
            self._field_bytes += len(data)
            if self._field_bytes > MAX_FIELD_BYTES:
                raise RefusedError(
                    400, "MaxPostPreDataLengthExceeded", "The fields before the file are too long."
                )
            self._value += data
            return
        assert self._allowed is not None
        self._size += len(data)
        if self._size > self._allowed.max_bytes:
            raise RefusedError(
                400, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size."
            )
        await self._upload.write(data)

    async def _end(self) -> bool:
        """Whether the form is complete."""
        if self._upload is None:
            if self._name in self._fields:
                raise RefusedError(400, "InvalidArgument", f"The form has the field {self._name} twice.")
            self._fields[self._name] = self._value.decode("utf-8", "replace")
            return False
        assert self._allowed is not None
        if self._size < self._allowed.min_bytes:
            raise RefusedError(
                400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size."
            )
        await self._upload.finish()
        return True
