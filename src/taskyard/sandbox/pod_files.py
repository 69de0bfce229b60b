"""Files of the server for a command in a pod: copied below /run/taskyard, since a pod sees no file of a host."""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from taskyard.sandbox.carried import CarriedProcess
from taskyard.sandbox.pod_inside import PLACE
from taskyard.sandbox.provider import Mount, SandboxError
from taskyard.sandbox.rules import check_target

CHUNK = 256 * 1024
COPY_S = 600.0

# $1 = target. What is there of an earlier, unfinished copy is of no use.
_FOLDER = 'rm -rf -- "$1" && mkdir -p -- "$1" && exec tar -x --no-same-owner -C "$1"'
_FILE = 'mkdir -p -- "$(dirname -- "$1")" && cat > "$1" && chmod 755 -- "$1"'

Run = Callable[[Sequence[str]], Awaitable[CarriedProcess]]
"""Starts a command with a standard input."""


def placed(argv: Sequence[str], mounts: Sequence[Mount]) -> tuple[list[str], tuple[Mount, ...]]:
    """A command and its mounts, all below PLACE. Raises SandboxError for a mount that cannot be there.

    A single file that the command names (a script, say) goes to PLACE, and the command names it there.
    """
    command, found = list(argv), []
    for number, mount in enumerate(dict.fromkeys(mounts)):
        check_target(mount.target)
        if mount.writable or mount.symlink:
            raise SandboxError(
                f"{mount.target}: a pod gets copies of files only, nothing writable and no links"
            )
        if not mount.source.exists():
            raise SandboxError(f"{mount.source} is to be seen in a sandbox, and does not exist")
        if mount.target.startswith(f"{PLACE}/"):
            found.append(mount)
        elif mount.target in command and mount.source.is_file():
            target = f"{PLACE}/files/{number}/{posixpath.basename(mount.target)}"
            command = [target if word == mount.target else word for word in command]
            found.append(replace(mount, target=target))
        else:
            raise SandboxError(f"{mount.target} cannot be mounted in a pod: put it into the image")
    return command, tuple(found)


@dataclass
class _Copy:
    """A copy of a file or folder of the server in the pod. users: how many commands have it."""

    source: str
    users: int = 0
    ready: bool = False


class Copies:
    """The copies in one pod, each for as long as a command has it."""

    def __init__(self) -> None:
        self._copies: dict[str, _Copy] = {}
        self._stale: set[str] = set()
        self._bringing = asyncio.Lock()

    @contextmanager
    def used(self, mounts: Sequence[Mount]) -> Iterator[None]:
        """A command has these. Raises SandboxError when there is another copy at the place of one."""
        with ExitStack() as users:
            for mount in mounts:
                self._take(mount)
                users.callback(self._leave, mount)
            yield

    async def bring(self, mounts: Sequence[Mount], run: Run) -> None:
        """Copy those that are not there yet. Raises SandboxError, KilledError."""
        if not mounts:
            return
        async with self._bringing:
            for mount in mounts:
                if not (there := self._copies[mount.target]).ready:
                    await copy(mount, run)
                    there.ready = True

    def stale(self) -> list[str]:
        """Copies that no command has any more; whoever asks removes them."""
        found = sorted(self._stale - self._copies.keys())
        self._stale.clear()
        return found

    def _take(self, mount: Mount) -> None:
        there = self._copies.setdefault(mount.target, _Copy(str(mount.source)))
        if there.source != str(mount.source):
            raise SandboxError(f"{mount.target} is in use for {there.source}")
        there.users += 1

    def _leave(self, mount: Mount) -> None:
        there = self._copies[mount.target]
        there.users -= 1
        if there.users == 0:
            del self._copies[mount.target]
            self._stale.add(mount.target)


async def copy(mount: Mount, run: Run) -> None:
    """Copy a file or folder to its target inside. Raises SandboxError, KilledError."""
    script = _FOLDER if mount.source.is_dir() else _FILE
    try:
        async with asyncio.timeout(COPY_S):
            process = await run(["/bin/sh", "-c", script, "sh", mount.target])
            try:
                assert process.stdin is not None
                with suppress(ConnectionError):  # it ended early, and says why
                    async for chunk in _content(mount.source):
                        process.stdin.write(chunk)
                        await process.stdin.drain()
                process.stdin.close()
                end = await process.wait()
            finally:
                await process.kill()
    except TimeoutError:
        raise SandboxError(f"copying {mount.target} into a pod took longer than {COPY_S:g} seconds") from None
    if end.code != 0:
        said = end.stderr_tail.strip() or f"exit status {end.code}"
        raise SandboxError(f"{mount.target} cannot be copied into a pod: {said}")


async def _content(source: Path) -> AsyncIterator[bytes]:
    """A file as it is, a folder as a tar archive. Raises SandboxError."""
    if await asyncio.to_thread(source.is_file):
        with await asyncio.to_thread(source.open, "rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK):
                yield chunk
        return
    tar = await asyncio.create_subprocess_exec(
        "tar", "-c", "-C", str(source), ".",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert tar.stdout is not None
    try:
        while chunk := await tar.stdout.read(CHUNK):
            yield chunk
        if await tar.wait() not in (0, 1):  # 1: a file has changed meanwhile
            raise SandboxError(f"{source} cannot be read")
    finally:
        if tar.returncode is None:
            tar.kill()
            await tar.wait()
