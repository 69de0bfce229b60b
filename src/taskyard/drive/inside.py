"""Running scripts of ours inside a sandbox. What they print is the agent's word only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from io import RawIOBase
from pathlib import Path

from taskyard.errors import TaskyardError
from taskyard.forge.git import config_environment, masked
from taskyard.sandbox.provider import Exit, KilledError, Mount, Process, Sandbox, SandboxError

CHUNK = 1024 * 1024
MAX_OUTPUT = 64 * 1024
NOTHING = 3
"""Exit status of our scripts for "there is nothing to do"; git itself uses 1, 128 and 129."""

# Best effort only, for predictable results: the agent can run anything in there anyway.
ENVIRONMENT = {
    "LC_ALL": "C",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_EDITOR": "true",
    "GIT_NO_REPLACE_OBJECTS": "1",
    **config_environment((
        ("core.hooksPath", "/dev/null"),
        ("core.fsmonitor", "false"),
        ("core.bare", "false"),
        ("commit.gpgSign", "false"),
        ("gc.auto", "0"),
        ("maintenance.auto", "false"),
    )),
}  # fmt: skip


class TooLargeError(TaskyardError):
    """What a script wrote is larger than its limit."""


class TooSlowError(TaskyardError):
    """A script took longer than its limit."""


def script(text: str, *args: str) -> list[str]:
    return ["/bin/sh", "-c", text, "sh", *args]


@contextlib.asynccontextmanager
async def started(
    sandbox: Sandbox,
    argv: Sequence[str],
    *,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    mounts: Sequence[Mount] = (),
    stdin: bool = False,
) -> AsyncIterator[Process]:
    process = await sandbox.exec(
        argv, env={**ENVIRONMENT, **(env or {})}, cwd=cwd, mounts=mounts, stdin=stdin
    )
    try:
        yield process
    finally:
        await process.kill()


async def run(
    sandbox: Sandbox,
    argv: Sequence[str],
    *,
    timeout: float,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    mounts: Sequence[Mount] = (),
) -> tuple[int, bytes, str]:
    """Exit code (-1: out of time), the first MAX_OUTPUT bytes of standard output, why it failed in words."""
    output = b""
    try:
        async with (
            asyncio.timeout(timeout),
            started(sandbox, argv, env=env, cwd=cwd, mounts=mounts) as process,
        ):
            while chunk := await process.stdout.read(CHUNK):
                output = (output + chunk)[:MAX_OUTPUT]
            exit_ = checked(await process.wait())
    except TimeoutError:
        return -1, output, f"it took longer than {timeout:g} seconds"
    return exit_.code, output, said(exit_)


def _write_all(file: RawIOBase, data: bytes) -> None:
    """On a disk that gets full, one write takes a part of the data and says so; the next one fails."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SandboxError(f"a temporary file cannot be written: {error.strerror or error}") from error


@contextlib.asynccontextmanager
async def output_file(
    sandbox: Sandbox,
    argv: Sequence[str],
    *,
    timeout: float,
    max_bytes: int,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    folder: Path | None = None,
    suffix: str = "",
) -> AsyncIterator[tuple[Path, Exit, int]]:
    """What a script writes to standard output, in a file of the server's that is removed afterwards.

    Gives the file, how the script ended, and the size in bytes. Raises TooLargeError, TooSlowError, SandboxError when
    the file cannot be written.
    """
    with _writing():
        descriptor, name = await asyncio.to_thread(tempfile.mkstemp, suffix, "", folder or sandbox.scratch)
    path = Path(name)
    try:
        size = 0
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            try:
                async with (
                    asyncio.timeout(timeout),
                    started(sandbox, argv, env=env, cwd=cwd) as process,
                ):
                    while chunk := await process.stdout.read(CHUNK):
                        size += len(chunk)
                        if size > max_bytes:
                            raise TooLargeError(f"more than {max_bytes / 2**20:g} MB")
                        with _writing():
                            await asyncio.to_thread(_write_all, file, chunk)
                    exit_ = checked(await process.wait())
            except TimeoutError:
                raise TooSlowError(f"longer than {timeout:g} seconds") from None
        yield path, exit_, size
    finally:
        await asyncio.to_thread(path.unlink, missing_ok=True)


async def feed(
    sandbox: Sandbox,
    argv: Sequence[str],
    chunks: AsyncIterator[bytes],
    *,
    timeout: float,
    mounts: Sequence[Mount] = (),
) -> tuple[int, str]:
    """Run a script with these bytes as its standard input; exit code (-1: out of time), why it failed."""
    try:
        async with asyncio.timeout(timeout), started(sandbox, argv, stdin=True, mounts=mounts) as process:
            assert process.stdin is not None
            # It may end early, and says why.
            with contextlib.suppress(ConnectionError):
                async for chunk in chunks:
                    process.stdin.write(chunk)
                    await process.stdin.drain()
            process.stdin.close()
            while await process.stdout.read(CHUNK):
                pass
            exit_ = checked(await process.wait())
    except TimeoutError:
        return -1, f"it took longer than {timeout:g} seconds"
    return exit_.code, said(exit_)


def checked(exit_: Exit) -> Exit:
    """An exit that was not a kill from outside. Raises KilledError for one that was, also of git's own helpers."""
    if exit_.reason == "killed" or (exit_.code != 0 and "died of signal 9" in exit_.stderr_tail):
        raise KilledError("a program in the sandbox was killed")
    return exit_


def said(exit_: Exit) -> str:
    """Why a script failed, in words."""
    why = "it ran out of memory. " if exit_.reason == "oom" else ""
    return why + (masked(exit_.stderr_tail).strip() or f"exit status {exit_.code}")
