"""Objects as files in the data folder.

A file is named by the hash of its key, so no key can lead out of the folder or be too long for a file name. It
begins with a line of JSON that says what it is; the object's bytes follow. It is written under another name, synced
and renamed: an object is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar
from urllib.parse import quote

from taskyard.objects.forms import FormSigner
from taskyard.objects.interface import CHUNK_BYTES, DEFAULT_TYPE, VALID_S, Content, Form, StorageError, Stored

ROUTE = "/api/objects"
"""Where `objects/api.py` takes forms, and gives objects below it."""
MAX_HEADER_BYTES = 16_384
ABANDONED_S = 3600
"""An upload that nothing was written to for this long is not going on any more."""


class DiskFullError(StorageError):
    """The disk of the object storage is full: nothing can be stored."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An object's file, open at its first byte."""

    file: BinaryIO
    start: int
    size: int
    content_type: str
    tag: str
    """Changes with the object."""


class Upload:
    """A file being written; nothing is there before `finish`, and nothing is left after the block without it."""

    def __init__(self, folder: Path, key: str, content_type: str) -> None:
        self._target, self._folder = _path(folder, key), folder
        self._header = _header(key, content_type)
        self._part = folder / "incoming" / f"{secrets.token_hex(16)}.part"
        self._file: BinaryIO | None = None

    async def write(self, data: bytes) -> None:
        await _thread(self._write, data)

    async def finish(self) -> None:
        await _thread(self._finish)

    async def abandon(self) -> None:
        await _thread(self._abandon)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._file = os.fdopen(descriptor, "wb")
            self._file.write(self._header)
        self._file.write(data)

    def _finish(self) -> None:
        self._write(b"")
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._part.rename(self._target)
        _sync_folder(self._target.parent)

    def _abandon(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing writes what is left, perhaps to a full disk
                self._file.close()
            self._part.unlink(missing_ok=True)


class LocalStore:
    """The store of a site that keeps its files itself; every process of the site needs the same folder."""

    def __init__(self, folder: Path, signer: FormSigner) -> None:
        self._folder = folder
        self.signer = signer

    def upload_form(
        self,
        origin: str,
        key: str,
        max_bytes: int,
        *,
        valid_s: int = VALID_S,
        content_type: str | None = None,
    ) -> Form:
        return Form(origin + ROUTE, self.signer.fields(key, max_bytes, valid_s, content_type))

    def download_url(
        self,
        origin: str,
        key: str,
        *,
        valid_s: int = VALID_S,
        disposition: str | None = None,
        content_type: str | None = None,
    ) -> str:
        return f"{origin}{ROUTE}/{quote(key)}?{self.signer.query(key, valid_s, disposition, content_type)}"

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        async with self.upload(key, content_type) as upload:
            await upload.write(data)
            await upload.finish()

    async def put_file(self, key: str, path: Path, content_type: str) -> None:
        async with self.upload(key, content_type) as upload:
            with await _thread(path.open, "rb") as file:
                while data := await _thread(file.read, CHUNK_BYTES):
                    await upload.write(data)
            await upload.finish()

    @asynccontextmanager
    async def upload(self, key: str, content_type: str) -> AsyncIterator[Upload]:
        """Write an object piece by piece."""
        upload = Upload(self._folder, key, content_type)
        try:
            yield upload
        finally:
            await upload.abandon()

    async def head(self, key: str) -> Stored | None:
        opened = await self.open_file(key)
        if opened is None:
            return None
        opened.file.close()
        return Stored(opened.size, opened.content_type)

    async def open(self, key: str, *, start: int = 0) -> Content | None:
        opened = await self.open_file(key)
        if opened is None:
            return None
        if start:
            await _thread(opened.file.seek, opened.start + start)
        return Content(opened.size - start, chunks(opened.file, opened.size - start))

    async def open_file(self, key: str) -> OpenFile | None:
        """The object's file, for the caller to close; None when there is no such object."""
        return await _thread(_open, _path(self._folder, key))

    async def delete(self, keys: Sequence[str]) -> None:
        await _thread(_delete, [_path(self._folder, key) for key in keys])

    async def tidy(self) -> None:
        await _thread(_tidy, self._folder / "incoming")

    async def close(self) -> None:
        """Nothing is open between calls."""


async def chunks(file: BinaryIO, size: int) -> AsyncGenerator[bytes, None]:
    """The next `size` bytes of a file, which is closed at the end."""
    with file:
        while size > 0:
            data = await _thread(file.read, min(size, CHUNK_BYTES))
            if not data:
                raise StorageError("A stored object is shorter than it was when it was opened.")
            size -= len(data)
            yield data


P = ParamSpec("P")
T = TypeVar("T")


async def _thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of blocking work. When cancelled, it still waits: a file must not be closed under the work."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError from error
        raise StorageError(f"The folder of the object storage fails: {error.strerror}.") from error


def _path(folder: Path, key: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()
    return folder / name[:2] / name


def _header(key: str, content_type: str) -> bytes:
    return json.dumps({"key": key, "content_type": content_type[:255]}).encode() + b"\n"


def _open(path: Path) -> OpenFile | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        line = file.readline(MAX_HEADER_BYTES)
        status = os.fstat(file.fileno())
        content_type = str(json.loads(line)["content_type"])
    except (OSError, ValueError, KeyError) as error:
        file.close()
        raise StorageError("A file of the object storage is damaged.") from error
    tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
    return OpenFile(file, len(line), status.st_size - len(line), content_type or DEFAULT_TYPE, tag)


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    if not folder.is_dir():
        return
    for part in folder.iterdir():
        with suppress(FileNotFoundError):
            if part.stat().st_mtime < time.time() - ABANDONED_S:
                part.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
