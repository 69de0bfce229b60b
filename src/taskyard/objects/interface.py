"""What both stores do: objects under a key, uploaded by a signed form and read by a signed URL, or by the server."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from taskyard.errors import ServiceUnavailableError

VALID_S = 3600
"""How long forms and URLs are valid (tasks-api §8)."""
DEFAULT_TYPE = "application/octet-stream"
CHUNK_BYTES = 256 * 1024


class StorageError(ServiceUnavailableError):
    """The object storage does not answer. Try again in a moment."""


class SigningError(StorageError):
    """Nothing can be signed for the object storage. Its access keys are missing or wrong; the log says more."""


@dataclass(frozen=True, slots=True)
class Form:
    """A signed form: POST `fields` in this order, then the part `file`, as multipart/form-data to `url`."""

    url: str
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of an object without reading it."""

    size: int | None
    """Bytes; None when the storage does not say."""
    content_type: str


@dataclass(frozen=True, slots=True)
class Content:
    """An object that was opened: read the chunks to their end, or close them."""

    size: int
    chunks: AsyncGenerator[bytes, None]


class ObjectStore(Protocol):
    """Keys are texts such as `tasks/artifacts/…/notes.txt`; a later object replaces an earlier one under its key.

    `origin` is the address of this server as the client sees it. Everything but the two signing methods raises
    StorageError when the storage fails.
    """

    def upload_form(
        self,
        origin: str,
        key: str,
        max_bytes: int,
        *,
        valid_s: int = VALID_S,
        content_type: str | None = None,
    ) -> Form:
        """A form for one key that takes 0 to `max_bytes` bytes; of one type only when that is given.

        Raises SigningError.
        """

    def download_url(
        self,
        origin: str,
        key: str,
        *,
        valid_s: int = VALID_S,
        disposition: str | None = None,
        content_type: str | None = None,
    ) -> str:
        """A URL that GETs the object without credentials, answered with these headers. Raises SigningError."""

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store an object whole: afterwards it is there, or nothing has changed."""

    async def put_file(self, key: str, path: Path, content_type: str) -> None:
        """The same with what is in a file of the server's own, piece by piece."""

    async def head(self, key: str) -> Stored | None:
        """None when there is no such object."""

    async def open(self, key: str, *, start: int = 0) -> Content | None:
        """Read an object in chunks, from the byte `start` on, which it must have; None when there is no such object."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are removed already."""

    async def tidy(self) -> None:
        """Remove what broken uploads left."""

    async def close(self) -> None:
        """Give back connections; the store is not used any more."""


MEDIA_TYPE = re.compile(
    r"[\w!#$&^.+-]+/[\w!#$&^.+-]+(?: ?; ?[\w.+-]+=(?:[\w.+:/-]+|\"[\w .+:/-]*\"))*", re.ASCII
)


def media_type(text: str | None) -> str:
    """A content type that somebody named, if it may stand in a header; else that of any bytes."""
    return text if text and MEDIA_TYPE.fullmatch(text) else DEFAULT_TYPE


def attachment(name: str) -> str:
    """The Content-Disposition that saves an answer under a file name (RFC 6266)."""
    plain = re.sub(r"[^ !#-\[\]-~]|[%\\]", "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
