"""Files of this host in a container: bound where they are on an engine of this host, else copied in.

A copy goes into a nameless volume at its place, before the container starts: the root of a container is read-only,
also for the engine. The volume goes with the container.
"""

from __future__ import annotations

import asyncio
import posixpath
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from aiodocker.containers import DockerContainer

from taskyard.sandbox.docker_engine import Engine
from taskyard.sandbox.programs import SYSTEM
from taskyard.sandbox.provider import Mount, SandboxError
from taskyard.sandbox.rules import check_target

Json = dict[str, Any]

_SHARED = (*SYSTEM, "/etc", "/var", "/run", "/tmp", "/home", "/root", "/opt", "/srv")  # noqa: S108 - inside
"""Folders that a volume would hide more than one file of."""


@dataclass(frozen=True)
class Copy:
    """What is copied: a file as `folder`/`name`, or the content of a folder into `folder` (name is empty)."""

    source: Path
    folder: str
    name: str


@dataclass(frozen=True)
class Plan:
    """Mounts of a container's configuration, and what is to be copied into it before it starts."""

    mounts: list[Json]
    copies: list[Copy]


def plan(mounts: Sequence[Mount], *, copies: bool) -> Plan:
    """How files get in. Raises SandboxError for a mount that cannot be."""
    made = Plan([], [])
    folders: dict[str, None] = {}
    for mount in dict.fromkeys(mounts):
        check_target(mount.target)
        if mount.symlink:
            raise SandboxError(f"no symbolic link can be made at {mount.target} in a container")
        if not mount.source.exists():
            raise SandboxError(f"{mount.source} is to be seen in a sandbox, and does not exist")
        if not copies:
            made.mounts.append(_bind(mount))
            continue
        if mount.writable:
            raise SandboxError(
                f"{mount.target} is to be writable, and is a copy on an engine of another host"
            )
        folder, name = (mount.target, "") if mount.source.is_dir() else posixpath.split(mount.target)
        if folder in ("/", *_SHARED) or (name and folder.startswith(tuple(f"{top}/" for top in SYSTEM))):
            raise SandboxError(
                f"{mount.target} cannot be copied into a container without hiding what else is in {folder}: put it"
                " into the image"
            )
        made.copies.append(Copy(mount.source, folder, name))
        folders[folder] = None
    made.mounts.extend({"Type": "volume", "Target": folder} for folder in folders)
    return made


def _bind(mount: Mount) -> Json:
    return {
        "Type": "bind",
        "Source": str(mount.source.absolute()),
        "Target": mount.target,
        "ReadOnly": not mount.writable,
        "BindOptions": {"Propagation": "rprivate"},
    }


async def bring(engine: Engine, container: DockerContainer, copy: Copy, scratch: Path) -> None:
    """Copy into a container that has not started. Raises SandboxError."""
    try:
        with tempfile.TemporaryFile(dir=scratch) as file:
            await asyncio.to_thread(_pack, copy, file)
            file.seek(0)
            async with engine.asked(f"take a copy of {copy.source.name}"):
                await container.put_archive(copy.folder, file)
    except (OSError, tarfile.TarError) as error:
        raise SandboxError(f"{copy.source} cannot be copied into a sandbox: {error}") from error


def _pack(copy: Copy, file: IO[bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w") as tar:
        if copy.name:
            tar.add(copy.source.resolve(), copy.name, filter=_readable)
            return
        for path in sorted(copy.source.iterdir()):
            tar.add(path, path.name, filter=_readable)


def _readable(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Root's, and to be read by everybody: only this sandbox sees it."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode |= 0o555 if info.isdir() or info.mode & 0o100 else 0o444
    info.mode &= 0o755
    return info
