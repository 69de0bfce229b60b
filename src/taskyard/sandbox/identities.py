"""A host uid of its own for each sandbox of a server that runs as root.

A uid in use has a claim: a file named after it in CLAIMS, which holds the path of the sandbox's folder. A
claim whose folder is gone is void. CLAIMS is one for the whole host, so servers with different data folders
do not share uids either; it is emptied by a restart of the host, which folders outlive, so the uids that
the folders beside the new one name are skipped, too, and a folder that is used again claims its uid again.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from taskyard.errors import SetupError
from taskyard.sandbox.provider import SandboxError

CLAIMS = Path("/run/taskyard/uids")
_LOWEST = 1000
_RESERVED = (65534, 65535)
"""nobody, and the value that means "unchanged" to 16-bit system calls."""
_HIGHEST = 2**32 - 2


@dataclass(frozen=True)
class UidRange:
    """Uids, both ends included; each is used as the gid, too."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> UidRange:
        """From `first-last`. Raises SetupError when that is no range of ordinary users."""
        first, dash, last = text.strip().partition("-")
        hint = (
            "A server that runs as root runs each sandbox as a user of its own: set "
            "TASKYARD_SANDBOX__UID_RANGE to unused uids, such as 230000-295535, or start it as an ordinary user."
        )
        if not (dash and first.strip().isdecimal() and last.strip().isdecimal()):
            raise SetupError(f"sandbox.uid_range is {text!r}, which is not of the form first-last. {hint}")
        found = cls(int(first), int(last))
        if not _LOWEST <= found.first <= found.last <= _HIGHEST:
            raise SetupError(
                f"sandbox.uid_range is {text!r}: the uids must rise, from {_LOWEST} to {_HIGHEST} at most. {hint}"
            )
        return found

    def in_random_order(self) -> Iterator[int]:
        """All of them, from a random one on: a uid that was just freed is not the next one taken."""
        count = self.last - self.first + 1
        start = random.randrange(count)  # noqa: S311 - nobody gains by guessing it
        return (self.first + (start + step) % count for step in range(count))


def claim(uids: UidRange, folder: Path, taken: Iterable[int] = ()) -> int:
    """A uid that no sandbox and no user of this host has. `folder` must exist; `taken` are skipped.

    Raises SandboxError when all are in use.
    """
    with _locked():
        used = set(taken) | set(_claimed())
        for uid in uids.in_random_order():
            if uid not in used and uid not in _RESERVED and not _is_user(uid):
                (CLAIMS / str(uid)).write_text(str(folder), "utf-8")
                return uid
    raise SandboxError(
        f"all uids from {uids.first} to {uids.last} are in use by sandboxes: "
        "enlarge TASKYARD_SANDBOX__UID_RANGE, or remove sandboxes that are left over"
    )


def claim_again(uid: int, folder: Path) -> bool:
    """Renew the claim of a sandbox that is there; False when another has got its uid meanwhile."""
    with _locked():
        if (found := _claimed().get(uid)) is None:
            (CLAIMS / str(uid)).write_text(str(folder), "utf-8")
        return found is None or found.samefile(folder)


def release(uid: int, folder: Path) -> None:
    """Give up the claim of a sandbox, if it is (still) its claim."""
    with _locked():
        path = CLAIMS / str(uid)
        if path.exists() and path.read_text("utf-8") == str(folder):
            path.unlink()


def folders() -> list[Path]:
    """The folders of all sandboxes on this host, of all servers that run as root. Void claims are removed."""
    with _locked():
        return list(_claimed().values())


def _claimed() -> dict[int, Path]:
    claimed = {}
    for path in CLAIMS.iterdir():
        if not path.name.isdecimal():
            continue
        folder = Path(path.read_text("utf-8"))
        if folder.exists():
            claimed[int(path.name)] = folder
        else:
            path.unlink()
    return claimed


def _is_user(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


@contextmanager
def _locked() -> Iterator[None]:
    CLAIMS.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(CLAIMS / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
