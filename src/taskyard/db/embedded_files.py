"""Files of the embedded PostgreSQL: locks, private folders, and what the system's refusals mean."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from taskyard.errors import SetupError


class FileLock:
    """A shared or exclusive lock (flock) on a file, which is created when absent and never removed.

    The lock ends with its holder, however that dies. It belongs to the open file: a child that
    inherits the descriptor keeps the lock after the parent has released its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def fileno(self) -> int:
        """The descriptor that carries the lock."""
        if self._fd is None:
            raise ValueError(f"{self.path} is not locked")
        return self._fd

    def try_acquire(self, *, shared: bool = False) -> bool:
        """Take the lock if nobody stands in the way; never waits."""
        if self._fd is not None:
            raise ValueError(f"{self.path} is already locked by this object")
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def release(self) -> None:
        """Close our descriptor; the lock ends when no inherited copy is open any more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class ServeLock:
    """Held while `taskyard serve` runs on a data folder: a context manager that refuses a second server.

    Raises SetupError with the pid of the holder.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._lock = FileLock(data_dir / "serve.lock")

    def __enter__(self) -> ServeLock:
        with folder_errors(self.data_dir):
            make_private(self.data_dir)
            if not self._lock.try_acquire():
                holder = self._lock.path.read_text("ascii").strip() or "unknown"
                raise SetupError(
                    f"another Taskyard server (pid {holder}) already uses {self.data_dir}; "
                    "stop it or give --data-dir"
                )
            os.ftruncate(self._lock.fileno(), 0)
            os.pwrite(self._lock.fileno(), f"{os.getpid()}\n".encode("ascii"), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


def make_private(folder: Path) -> None:
    """Create a folder for its owner only, and what is missing above it; an existing one stays as it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn the system's refusals inside the block into a SetupError about the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise disk_full(folder) from error
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise SetupError(
                f"the data folder {folder} cannot be a folder: {error.filename} is a file. "
                "Remove it or give another --data-dir"
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise SetupError(
                f"cannot use the data folder {folder}: {error.strerror} ({error.filename}). "
                "Run as the folder's owner, or give another --data-dir"
            ) from error
        raise SetupError(f"cannot use the data folder {folder}: {error}") from error


def disk_full(folder: Path) -> SetupError:
    """The error for a full disk or an exhausted quota."""
    return SetupError(f"no space is left for {folder}: free some on that disk, then start again")
