"""What runs in a pod besides commands: `python3 -I -S -c SOURCE keep|run|end …`; the interpreter is the image's.

keep SECONDS            the main process: keeps the pod until then, and ends what has lost its command
run FLAGS SIZE TOKEN    becomes the program of SIZE bytes that standard input begins with (a carrier)
end [TOKEN]             ends the command that was started with the token, and what has lost its command; without
                        a token everything that is not the main process. Prints an account as JSON.

What an engine starts in a running container has no parent there (0). What the agent starts has; and when a
carrier is killed, what it carried falls to process 1. So a process below process 1 has lost its command.
Standard library only, for Python 3.9 and later.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

LOOK_S = 2.0
END_S = 10.0
FLEETING = ("/tmp", "/dev/shm")  # noqa: S108 - paths inside
WORKSPACE = "/tmp/workspace"  # noqa: S108
PLACE = "/run/taskyard"
"""Where files of the server are put for a command."""
OOM_COUNTERS = (
    "/sys/fs/cgroup/memory.events",
    "/sys/fs/cgroup/memory/memory.oom_control",
)


def processes() -> dict[int, int]:
    """All living processes, and their parents."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat") as file:  # noqa: PTH123
                words = file.read().rpartition(")")[2].split()
                if words[0] not in "ZX":
                    found[int(name)] = int(words[1])
    return found


def keeper(parents: dict[int, int]) -> int:
    """The main process: number 1, or, where the pod has another first process, its oldest child of this kind."""
    ours = [pid for pid in parents if parents[pid] in (0, 1) and arguments(pid)[5:6] == [b"keep"]]
    return min(ours, default=1)


def arguments(pid: int) -> list[bytes]:
    """The command line of a process; nothing if it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            return file.read().split(b"\0")[:-1]
    except OSError:
        return []


def below(parents: dict[int, int], top: set[int]) -> set[int]:
    """What descends from one of these."""
    found: set[int] = set()
    for pid, parent in parents.items():
        above = parent
        while above in parents and above not in top:
            above = parents[above]
        if above in top:
            found.add(pid)
    return found


def lost() -> set[int]:
    """What has lost its command."""
    parents = processes()
    return below(parents, {1}) - {keeper(parents), os.getpid()}


def command(token: str) -> set[int]:
    """A command that was started with this token, with all below it."""
    parents = processes()
    word = token.encode()
    top = {pid for pid in parents if parents[pid] == 0 and arguments(pid)[-1:] == [word]} - {os.getpid()}
    return top | below(parents, top)


def everything() -> set[int]:
    parents = processes()
    return set(parents) - {1, keeper(parents), os.getpid()}


def kill(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def keep(seconds: float) -> int:
    """Until the time is over, or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead need nobody to ask for them
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(LOOK_S)
        kill(lost())
    return 0


def run(flags: str, size: int) -> NoReturn:
    """flags: JSON with `alone` (no other command runs: the fleeting places are emptied), `remove` (paths)."""
    wanted = json.loads(flags)
    if wanted["alone"]:
        for folder in FLEETING:
            empty(folder)
    for path in wanted["remove"]:
        remove(path)
    source = b""
    while len(source) < size:
        source += os.read(0, size - len(source)) or os._exit(125)
    exec(compile(source, "carrier", "exec"), {"__name__": "__main__"})  # noqa: S102 - it came from the server
    os._exit(125)


def empty(folder: str) -> None:
    """Remove all in it; what cannot be removed stays."""
    with suppress(OSError):
        for name in os.listdir(folder):  # noqa: PTH208
            if os.path.join(folder, name) != WORKSPACE:  # noqa: PTH118
                remove(os.path.join(folder, name))  # noqa: PTH118


def remove(path: str) -> None:
    def open_up(_function: object, inner: str, _error: object) -> None:
        with suppress(OSError):
            os.chmod(os.path.dirname(inner), 0o700)  # noqa: PTH101, PTH120
            os.chmod(inner, 0o700)  # noqa: PTH101
            shutil.rmtree(inner, ignore_errors=True) if os.path.isdir(inner) else os.unlink(inner)  # noqa: PTH108, PTH112

    with suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):  # noqa: PTH112, PTH114
            shutil.rmtree(path, onerror=open_up)
        else:
            os.unlink(path)  # noqa: PTH108


def end(token: str | None) -> int:
    """0 when all of it is gone."""
    until = time.monotonic() + END_S
    while True:
        left = command(token) | lost() if token is not None else everything()
        if not left or time.monotonic() > until:
            break
        kill(left)
        time.sleep(0.005)
    if token is None:
        for folder in (*FLEETING, PLACE):
            empty(folder)
    print(json.dumps({"left": len(left), "oom_kills": oom_kills()}))  # noqa: T201 - for the server
    return 1 if left else 0


def oom_kills() -> int:
    """How many processes of this container were killed for want of memory; 0 where nobody can say."""
    for name in OOM_COUNTERS:
        with suppress(OSError), open(name) as file:  # noqa: PTH123
            for line in file:
                if match := re.fullmatch(r"oom_kill (\d+)\s*", line):
                    return int(match[1])
    return 0


def shut() -> None:
    """Nobody of the same user can trace this process, or write to its output, from now on."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def main(words: list[str]) -> int:
    if words[0] != "run":
        shut()
    if words[0] == "keep":
        return keep(float(words[1]))
    if words[0] == "run":
        run(words[1], int(words[2]))
    return end(words[1] if len(words) > 1 else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
