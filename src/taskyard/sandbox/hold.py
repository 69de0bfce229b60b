"""What a server has on its own host of each sandbox: DATA/sandboxes/ID/{scratch,sandbox.json}, and a lock.

The folder is the server's alone (0700). `scratch` is for its temporary files about the sandbox: they go with it,
whatever becomes of the server. A lock (flock) on the folder says that a living process has the sandbox; the
system frees it, however the process ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from taskyard.sandbox.provider import Limits, SandboxError

RECORD = "sandbox.json"
Facts = dict[str, Any]
"""What a provider keeps in the record besides the limits."""


@dataclass
class Hold:
    """An existing folder, locked for this process until it is removed or closed.

    limits: None when the folder is damaged; it can be removed, but not used.
    """

    path: Path
    limits: Limits | None
    facts: Facts
    _lock: int

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @classmethod
    def create(cls, path: Path, limits: Limits, prepare: Callable[[], Facts] = dict) -> Hold:
        """Make the folder. prepare: called when it is there and locked, before its record is written.

        Raises SandboxError, OSError, and what `prepare` raises; then there is no folder.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Nobody who looks for leftovers gets between the folder and its lock.
        with _gate(path.parent, fcntl.LOCK_SH):
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                raise SandboxError(f"a sandbox named {path.name} exists already") from None
            lock = _lock(path)
        try:
            hold = cls(path, limits, prepare(), lock)
            hold._write_record()
            hold.scratch.mkdir(mode=0o700)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # no agent has been in there
            os.close(lock)
            raise
        return hold

    @classmethod
    def open(cls, path: Path) -> Hold | None:
        """An existing folder, or None. Raises SandboxError when another process uses it."""
        try:
            with _gate(path.parent, fcntl.LOCK_EX):
                lock = _lock(path)
        except FileNotFoundError:
            return None
        record = read_record(path)
        limits = Limits(**record["limits"]) if "limits" in record else None
        return cls(path, limits, record, lock)

    @property
    def closed(self) -> bool:
        return self._lock < 0

    async def clear_scratch(self) -> None:
        """Remove what is in the folder for temporary files. Raises SandboxError."""
        try:
            self.scratch.mkdir(mode=0o700, exist_ok=True)
            left = list(self.scratch.iterdir())
        except OSError:  # no room for it, or damaged: it can still be removed
            self.limits = None
            return
        if left:
            await remove_trees(left)

    async def remove(self, *inner: Path) -> None:
        """Remove the folder, with further folders in it, whatever is in those. Raises SandboxError, OSError."""
        if there := [path for path in (*inner, self.scratch) if is_there(path)]:
            await remove_trees(there)
        # The record goes last: it says whose files they are, if we are interrupted before.
        for name in (f"{RECORD}.new", RECORD):
            with suppress(FileNotFoundError):
                (self.path / name).unlink()
        with suppress(FileNotFoundError):
            self.path.rmdir()

    def close(self) -> None:
        """Let go of the folder, and keep it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _write_record(self) -> None:
        assert self.limits is not None
        record = {
            "id": self.path.name,
            **self.facts,
            "created_at": datetime.now(UTC).isoformat(),
            "limits": vars(self.limits),
        }
        new = self.path / f"{RECORD}.new"
        new.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        new.replace(self.path / RECORD)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a folder; nothing where there is none."""
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


async def remove_trees(paths: Sequence[Path]) -> None:
    """Remove folders that an agent wrote, links and unreadable folders included, and follow no link.

    rm walks by descriptors, to any depth. The owner of a folder without permissions must give them to
    itself first; root need not. Raises SandboxError.
    """
    await _coreutil("rm", "-rf", "--one-file-system", "--", *map(str, paths))
    left = [str(path) for path in paths if is_there(path)]
    if left:
        await _coreutil("chmod", "-R", "u+rwx", "--", *left)
        said = await _coreutil("rm", "-rf", "--one-file-system", "--", *left)
        if any(map(is_there, paths)):
            raise SandboxError(f"the folder of a sandbox cannot be removed: {said or left[0]}")


def is_there(path: Path) -> bool:
    """Whether something has this name, be it a broken link."""
    return os.path.lexists(path)


async def _coreutil(*command: str) -> str:
    """Run it; the end of its messages."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={"PATH": os.defpath, "LC_ALL": "C"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    tail = b""
    while chunk := await process.stderr.read(65536):
        tail = (tail + chunk)[-1000:]
    await process.wait()
    return tail.decode("utf-8", "replace").strip()


@contextmanager
def _gate(root: Path, kind: int) -> Iterator[None]:
    """A moment's lock on the folder of all sandboxes; waits for it."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SandboxError(f"the sandbox {path.name} is in use by another process") from None
    return descriptor


def check_id(sandbox_id: str) -> str:
    """The id, if it can be the name of a folder, a control group and a container. Raises SandboxError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", sandbox_id):
        raise SandboxError(
            f"{sandbox_id!r} cannot be the name of a sandbox: letters, digits, '.', '_' and '-', 100 at most"
        )
    return sandbox_id
