"""The folder of one sandbox on the host: DATA/sandboxes/ID/{workspace,home,sandbox.json}.

Only the two inner folders belong to the sandbox's user; the one around them is the server's alone (0700),
so that nobody else on the host gets near what an agent wrote. The server itself never opens a path in there.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
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

    @classmethod
    def create(cls, path: Path, limits: Limits, uids: UidRange | None) -> Folder:
        """Make the folder, with a new uid if there is a range. Raises SandboxError, SetupError, OSError."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise SandboxError(f"a sandbox named {path.name} exists already") from None
        lock = -1
        try:
            lock = _lock(path)
            identity = None
            if uids is not None:
                uid = identities.claim(uids, path, _recorded_uids(path.parent))
                identity = Identity(uid, uid)
            folder = cls(path, identity, limits, lock)
            folder._write_record()
            for inner in (folder.workspace, folder.home):
                inner.mkdir(mode=0o700)
                if identity is not None:
                    os.chown(inner, identity.uid, identity.gid)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # no agent has been in there
            if lock >= 0:
                os.close(lock)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> Folder | None:
        """An existing folder, or None. Raises SandboxError when another process uses it."""
        try:
            lock = _lock(path)
        except FileNotFoundError:
            return None
        record = _read_record(path)
        uid = record.get("uid")
        identity = Identity(uid, uid) if uid is not None else None
        limits = Limits(**record["limits"]) if "limits" in record else None
        return cls(path, identity, limits, lock)

    async def remove(self) -> None:
        """Remove the folder, whatever is in it, and free its uid. Nothing may run in it any more.

        Raises SandboxError with what could not be removed.
        """
        if self._lock < 0:
            return
        inner = [path for path in (self.workspace, self.home) if _is_there(path)]
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
