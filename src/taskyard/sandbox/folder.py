"""The folder of one sandbox on the host: DATA/sandboxes/ID/{workspace,home,scratch,sandbox.json}.

Only the workspace and the home belong to the sandbox's user; the one around them is the server's alone (0700),
so that nobody else on the host gets near what an agent wrote. The server itself never opens a path in there.
`scratch` is for the server's own temporary files about the sandbox: they go with it, whatever becomes of the server.

A lock (flock) on the folder says that a living process has it; the system frees it, however the process ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from taskyard.confine import Identity
from taskyard.sandbox import identities
from taskyard.sandbox.identities import UidRange
from taskyard.sandbox.provider import Limits, SandboxError

RECORD = "sandbox.json"


@dataclass
class Folder:
    """An existing sandbox folder, locked for this process until it is removed or closed.

    identity: the user its inner folders belong to; None: the server's own user.
    limits: None when the folder is damaged; it can be removed, but not used.
    """

    path: Path
    identity: Identity | None
    limits: Limits | None
    _lock: int

    @property
    def workspace(self) -> Path:
        return self.path / "workspace"

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @classmethod
    def create(cls, path: Path, limits: Limits, uids: UidRange | None) -> Folder:
        """Make the folder, with a new uid if there is a range. Raises SandboxError, SetupError, OSError."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Nobody who looks for leftovers gets between the folder and its lock.
        with _gate(path.parent, fcntl.LOCK_SH):
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                raise SandboxError(f"a sandbox named {path.name} exists already") from None
            lock = _lock(path)
        try:
            identity = None
            if uids is not None:
                uid = identities.claim(uids, path, _recorded_uids(path.parent))
                identity = Identity(uid, uid)
            folder = cls(path, identity, limits, lock)
            folder._write_record()
            folder.scratch.mkdir(mode=0o700)
            for inner in (folder.workspace, folder.home):
                inner.mkdir(mode=0o700)
                if identity is not None:
                    os.chown(inner, identity.uid, identity.gid)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # no agent has been in there
            os.close(lock)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> Folder | None:
        """An existing folder, or None. Raises SandboxError when another process uses it."""
        try:
            with _gate(path.parent, fcntl.LOCK_EX):
                lock = _lock(path)
        except FileNotFoundError:
            return None
        record = _read_record(path)
        uid = record.get("uid")
        identity = Identity(uid, uid) if uid is not None else None
        limits = Limits(**record["limits"]) if "limits" in record else None
        folder = cls(path, identity, limits, lock)
        if not all(_is_of(inner, identity) for inner in (folder.workspace, folder.home)):
            folder.limits = None
        return folder

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

    async def remove(self) -> None:
        """Remove the folder, whatever is in it, and free its uid. Nothing may run in it any more.

        Raises SandboxError with what could not be removed.
        """
        if self._lock < 0:
            return
        inner = [path for path in (self.workspace, self.home, self.scratch) if _is_there(path)]
        if inner:
            await remove_trees(inner)
        # The record goes last: it says whose files they are, if we are interrupted before.
        for name in (f"{RECORD}.new", RECORD):
            with suppress(FileNotFoundError):
                (self.path / name).unlink()
        with suppress(FileNotFoundError):
            self.path.rmdir()
        if self.identity is not None:
            identities.release(self.identity.uid, self.path)
        self.close()

    def close(self) -> None:
        """Let go of the folder, and keep it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _write_record(self) -> None:
        assert self.limits is not None
        record = {
            "id": self.path.name,
            "uid": self.identity.uid if self.identity else None,
            "created_at": datetime.now(UTC).isoformat(),
            "limits": vars(self.limits),
        }
        new = self.path / f"{RECORD}.new"
        new.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        new.replace(self.path / RECORD)


def group_name(path: Path) -> str:
    """What the control group of a sandbox with this folder is called.

    The inode is in it because servers with different data folders may use the same id. Raises FileNotFoundError.
    """
    return f"{path.name}.{path.lstat().st_ino:x}"


async def remove_trees(paths: Sequence[Path]) -> None:
    """Remove folders that an agent wrote, links and unreadable folders included, and follow no link.

    rm walks by descriptors, to any depth. The owner of a folder without permissions must give them to
    itself first; root need not. Raises SandboxError.
    """
    await _coreutil("rm", "-rf", "--one-file-system", "--", *map(str, paths))
    left = [str(path) for path in paths if _is_there(path)]
    if left:
        await _coreutil("chmod", "-R", "u+rwx", "--", *left)
        said = await _coreutil("rm", "-rf", "--one-file-system", "--", *left)
        if any(map(_is_there, paths)):
            raise SandboxError(f"the folder of a sandbox cannot be removed: {said or left[0]}")


def _is_of(path: Path, identity: Identity | None) -> bool:
    """Whether a folder was finished: it is there, and given to its user."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == (identity.uid if identity else os.geteuid())


def _is_there(path: Path) -> bool:
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


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _recorded_uids(root: Path) -> Iterator[int]:
    for path in root.iterdir():
        uid = _read_record(path).get("uid")
        if isinstance(uid, int):
            yield uid


def check_id(sandbox_id: str) -> str:
    """The id, if it can be the name of a folder and of a control group. Raises SandboxError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", sandbox_id):
        raise SandboxError(
            f"{sandbox_id!r} cannot be the name of a sandbox: letters, digits, '.', '_' and '-', 100 at most"
        )
    return sandbox_id
