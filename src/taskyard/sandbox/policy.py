"""What a command sees and may do in a sandbox, as options of bwrap.

Each option that looks odd closes a hole that was seen open:

- `/proc/sys` read-only: its files look at the uid outside, not at capabilities.
- `--disable-userns`: nested user namespaces are the kernel's largest attack surface.
- an own, sized `/dev/shm`, and `/` and `/dev` read-only: else they are unlimited memory file systems.
- options in a file and an empty environment for bwrap: both can be read inside, in /proc/1.
- entries in `/etc/passwd`: without one, Node.js's os.userInfo() throws.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from taskyard.sandbox import seccomp
from taskyard.sandbox.programs import SYSTEM
from taskyard.sandbox.provider import HOME, WORKSPACE, Limits, Mount
from taskyard.sandbox.rules import SHM, SHM_BYTES, TMP, UID, USER, VAR_TMP, check_target, environment

DOOR = "/run/taskyard/door.py"
_ETC_FILES = {
    "passwd": f"{USER}:x:{UID}:{UID}::{HOME}:/bin/sh\nnobody:x:65534:65534::/:/usr/sbin/nologin\n",
    "group": f"{USER}:x:{UID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_ETC_OF_HOST = (
    "ssl",
    "pki/tls/certs",
    "pki/ca-trust/extracted",
    "ca-certificates",
    "alternatives",
    "ld.so.cache",
)


class Handed:
    """Open descriptors that a child process is given. Close it once the child has started."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(self._fds)

    def add(self, fd: int) -> int:
        """Hand over, and own, a descriptor."""
        self._fds.append(fd)
        return fd

    def data(self, content: bytes) -> int:
        """A descriptor to read the content from, which is in memory only."""
        fd = self.add(os.memfd_create("taskyard", os.MFD_CLOEXEC))
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._fds:
            os.close(self._fds.pop())


@dataclass(frozen=True)
class Scene:
    """Everything about one command but the command itself. Mounts name their sources as bwrap sees them."""

    workspace: str
    home: str
    limits: Limits
    mounts: Sequence[Mount]
    env: Mapping[str, str]
    cwd: str
    door: bytes | None = None


def options(scene: Scene, handed: Handed, info_fd: int) -> list[str]:
    """The options of bwrap, for its `--args`. Data goes into descriptors that are added to `handed`.

    info_fd: where bwrap writes the process id of the sandbox's first process. Raises SandboxError for a
    mount where none may be, or an environment that cannot be.
    """
    return [
        "--unshare-all", "--unshare-user", "--disable-userns", "--assert-userns-disabled",
        "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--uid", str(UID), "--gid", str(UID), "--hostname", "sandbox",
        "--info-fd", str(info_fd), "--seccomp", str(handed.data(seccomp.program())),
        "--clearenv", *_environment(scene.env),
        *_system(handed),
        "--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys",
        "--dev", "/dev", "--size", str(SHM_BYTES), "--tmpfs", SHM, "--remount-ro", "/dev",
        "--perms", "1777", "--size", str(scene.limits.tmp_mb * 1024 * 1024), "--tmpfs", TMP,
        "--symlink", TMP, VAR_TMP,
        "--bind", scene.workspace, WORKSPACE, "--bind", scene.home, HOME,
        *(option for mount in scene.mounts for option in _mount(mount)),
        *(_file(handed, scene.door, DOOR) if scene.door is not None else ()),
        "--remount-ro", "/", "--chdir", scene.cwd,
    ]  # fmt: skip


def _environment(env: Mapping[str, str]) -> list[str]:
    return [word for name, value in environment(env).items() for word in ("--setenv", name, value)]


def _system(handed: Handed) -> list[str]:
    words = []
    for folder in SYSTEM:
        path = Path(folder)
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), folder]
        elif path.is_dir():
            words += ["--ro-bind", folder, folder]
    for name in _ETC_OF_HOST:
        words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for name, text in _ETC_FILES.items():
        words += _file(handed, text.encode(), f"/etc/{name}")
    return [*words, "--symlink", "../usr/lib/os-release", "/etc/os-release"]


def _file(handed: Handed, content: bytes, target: str) -> list[str]:
    return ["--perms", "0444", "--ro-bind-data", str(handed.data(content)), target]


def _mount(mount: Mount) -> list[str]:
    check_target(mount.target)
    if mount.symlink:
        return ["--symlink", str(mount.source), mount.target]
    return ["--bind" if mount.writable else "--ro-bind", str(mount.source), mount.target]
