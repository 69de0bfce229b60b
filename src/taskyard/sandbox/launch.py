"""The command line that starts bwrap: into the control group, under limits, as the sandbox's user."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from taskyard.confine import Identity, confined, staged
from taskyard.sandbox.cgroups import Cgroups, Group
from taskyard.sandbox.folder import Folder
from taskyard.sandbox.identities import UidRange
from taskyard.sandbox.policy import DOOR, Handed, Scene, options
from taskyard.sandbox.programs import program_mounts
from taskyard.sandbox.provider import Mount, SandboxError

FILE_BYTES = 16 * 1024**3
"""The largest file that a sandbox can write. How much it writes in all is not limited here."""
DESCRIPTORS = 65_536
"""Of one process. The server may have far more, and programs that look through all they might have would take long."""

# Arguments: control groups, then "--", then the command. "0" stands for the process that writes, which is
# the shell itself, since its echo is built in. What cannot be limited does not start.
_ENTER = """
set -e
umask 022
ulimit -c 0
while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs"; shift; done
shift
exec "$@"
"""


@dataclass(frozen=True)
class Host:
    """What this machine has for sandboxes."""

    bwrap: str
    cgroups: Cgroups | None
    uids: UidRange | None
    """None: sandboxes run as the server's own user."""


def command_line(
    host: Host,
    folder: Folder,
    group: Group | None,
    scene: Scene,
    command: Sequence[str],
    handed: Handed,
    info_fd: int,
) -> list[str]:
    """The command that becomes bwrap and runs `command` in a scene, whose sources are host paths.

    Raises SandboxError for mounts and variables that cannot be.
    """
    mounts = list(dict.fromkeys(scene.mounts))
    for mount in mounts:
        if not mount.symlink and not mount.source.exists():
            raise SandboxError(f"{mount.source} is to be seen in a sandbox, and does not exist")
    if folder.identity is None:
        line = _bwrap(host.bwrap, replace(scene, mounts=mounts), command, handed, info_fd)
    else:
        # Also bwrap, which may lie in somebody's home.
        paths = [folder.workspace, folder.home, Path(host.bwrap)]
        for index, mount in enumerate(mounts):
            if not mount.symlink:
                mounts[index] = replace(mount, source=Path(staged(len(paths))))
                paths.append(mount.source)
        seen = replace(scene, workspace=staged(0), home=staged(1), mounts=mounts)
        line = confined(folder.identity, paths, _bwrap(staged(2), seen, command, handed, info_fd))
    assert folder.limits is not None
    limits = [
        f"--fsize={_at_most(resource.RLIMIT_FSIZE, FILE_BYTES)}",
        f"--nofile={_at_most(resource.RLIMIT_NOFILE, DESCRIPTORS)}",
    ]
    if group is None:
        pids = _at_most(resource.RLIMIT_NPROC, folder.limits.pids + _tasks_of(folder.identity))
        limits.append(f"--nproc={pids}")
    groups = [str(path) for path in group.folders] if group else []
    return ["sh", "-c", _ENTER, "sh", *groups, "--", "prlimit", *limits, "--", *line]


def door_command(command: Sequence[str], channel: int) -> tuple[list[str], tuple[Mount, ...]]:
    """The command that opens the door through descriptor `channel` first, and the mounts that needs."""
    python, mounts = program_mounts(
        ["/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable]
    )
    return [*python, "-I", "-S", DOOR, str(channel), *command], mounts


def _bwrap(bwrap: str, scene: Scene, command: Sequence[str], handed: Handed, info_fd: int) -> list[str]:
    words = options(scene, handed, info_fd)
    arguments = handed.data(b"".join(os.fsencode(word) + b"\0" for word in words))
    return [bwrap, "--args", str(arguments), "--", *command]


def _at_most(limit: int, wanted: int) -> int:
    """The limit we want, or the lower one that we are under ourselves and cannot raise."""
    hard = resource.getrlimit(limit)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def _tasks_of(identity: Identity | None) -> int:
    """Threads that already run as the user of a sandbox, and count against its RLIMIT_NPROC."""
    uid = os.geteuid() if identity is None else identity.uid
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile
            if path.stat().st_uid == uid:
                count += sum(1 for _ in (path / "task").iterdir())
    return count
