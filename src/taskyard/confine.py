"""Start a program as another uid that sees named host paths under short names.

A server that runs as root keeps its data folder private (0700) and still has to hand single folders of
it to programs of other uids: the sandbox's workspace, PostgreSQL's data. In a mount namespace of its
own, each such path is bound below STAGE, which anybody may traverse; then the privileges are dropped.
Nothing is mounted in the server's own namespace, and the mounts go with the process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STAGE = "/mnt"

# $1 = uid, $2 = gid, $3 = number of bound paths, then the paths, then the command. `set -e`: a mount
# that fails ends the start with mount's own message. It is put together over /sys, where no data is,
# and moved: a path to be bound may itself be below /mnt.
_SCRIPT = """
set -e
uid=$1 gid=$2 n=$3; shift 3
mount -t tmpfs -o mode=755,size=1m taskyard /sys
i=0
while [ "$i" -lt "$n" ]; do
  if [ -d "$1" ]; then mkdir "/sys/$i"; else : > "/sys/$i"; fi
  mount --bind "$1" "/sys/$i"
  i=$((i+1)); shift
done
mount --move /sys /mnt
exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs --inh-caps=-all \
  --bounding-set=-all -- "$@"
"""


@dataclass(frozen=True)
class Identity:
    """Numeric user and group of a confined program."""

    uid: int
    gid: int


def staged(index: int) -> str:
    """Where the index-th path of `confined` is seen by the program."""
    return f"{STAGE}/{index}"


def confined(identity: Identity, paths: Sequence[Path], argv: Sequence[str]) -> list[str]:
    """The command that runs argv as `identity`, with `paths` bound at staged(0), staged(1), ….

    Only for a server that is root. Relative order of paths is kept; a path must exist. The working
    directory and the environment are the caller's to set; symbolic links in a path are resolved.
    """
    if os.geteuid() != 0:
        raise PermissionError("only root can start a program as another user")
    bound = [str(path.resolve(strict=True)) for path in paths]
    return [
        "unshare", "--mount", "--propagation", "private", "--",
        "sh", "-c", _SCRIPT, "sh", str(identity.uid), str(identity.gid), str(len(bound)), *bound, *argv,
    ]  # fmt: skip
