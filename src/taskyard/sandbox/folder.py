"""The folder of one sandbox of this host: what `hold.py` has there, and DATA/sandboxes/ID/{workspace,home}.

Only these two belong to the sandbox's user; the one around them is the server's alone, so that nobody else on the
host gets near what an agent wrote. The server itself never opens a path in there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from taskyard.confine import Identity
from taskyard.sandbox import identities
from taskyard.sandbox.hold import Facts, Hold, read_record
from taskyard.sandbox.identities import UidRange
from taskyard.sandbox.provider import Limits, SandboxError


@dataclass
class Folder:
    """An existing sandbox folder, locked for this process until it is removed or closed.

    identity: the user its inner folders belong to; None: the server's own user.
    limits: None when the folder is damaged; it can be removed, but not used.
    """

    hold: Hold
    identity: Identity | None

    @property
    def path(self) -> Path:
        return self.hold.path

    @property
    def limits(self) -> Limits | None:
        return self.hold.limits

    @property
    def workspace(self) -> Path:
        return self.path / "workspace"

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def scratch(self) -> Path:
        return self.hold.scratch

    @classmethod
    def create(cls, path: Path, limits: Limits, uids: UidRange | None) -> Folder:
        """Make the folder, with a new uid if there is a range. Raises SandboxError, SetupError, OSError."""
        identity: Identity | None = None

        def prepare() -> Facts:
            nonlocal identity
            if uids is not None:
                uid = identities.claim(uids, path, _recorded_uids(path.parent))
                identity = Identity(uid, uid)
            for inner in ("workspace", "home"):
                (path / inner).mkdir(mode=0o700)
                if identity is not None:
                    os.chown(path / inner, identity.uid, identity.gid)
            return {"uid": identity.uid if identity else None}

        return cls(Hold.create(path, limits, prepare), identity)

    @classmethod
    def open(cls, path: Path) -> Folder | None:
        """An existing folder, or None; its uid is claimed again. Raises SandboxError when another process uses it."""
        hold = Hold.open(path)
        if hold is None:
            return None
        uid = hold.facts.get("uid")
        folder = cls(hold, Identity(uid, uid) if uid is not None else None)
        finished = all(_is_of(inner, folder.identity) for inner in (folder.workspace, folder.home))
        if finished and uid is not None and os.geteuid() == 0:
            # A restart of the host has taken the claim. Then its processes would be those of the other one, too.
            try:
                finished = identities.claim_again(uid, path)
            except OSError as error:
                hold.close()
                raise SandboxError(
                    f"the uid of the sandbox {path.name} cannot be claimed: {error}"
                ) from error
        if not finished:
            hold.limits = None
        return folder

    async def remove(self) -> None:
        """Remove the folder, whatever is in it, and free its uid. Nothing may run in it any more.

        Raises SandboxError with what could not be removed.
        """
        if self.hold.closed:
            return
        await self.hold.remove(self.workspace, self.home)
        if self.identity is not None:
            identities.release(self.identity.uid, self.path)
        self.close()

    def close(self) -> None:
        """Let go of the folder, and keep it."""
        self.hold.close()


def group_name(path: Path) -> str:
    """What the control group of a sandbox with this folder is called.

    The inode is in it because servers with different data folders may use the same id. Raises FileNotFoundError.
    """
    return f"{path.name}.{path.lstat().st_ino:x}"


def group_names(path: Path) -> tuple[str, str]:
    """Its two control groups: that of all that runs in it, and one beside it for the look at its disk.

    No other sandbox has such a name, since an inode ends each. Raises FileNotFoundError.
    """
    name = group_name(path)
    return name, f"{name}.look"


def _is_of(path: Path, identity: Identity | None) -> bool:
    """Whether a folder was finished: it is there, and given to its user."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == (identity.uid if identity else os.geteuid())


def _recorded_uids(root: Path) -> Iterator[int]:
    for path in root.iterdir():
        uid = read_record(path).get("uid")
        if isinstance(uid, int):
            yield uid
