"""Run git on the host, with nothing of the host's configuration and no way to ask a person.

Only for repositories that this server made (mirrors, bundles) and for transport to an origin. Never for
a tree that an agent wrote: there is no set of flags that makes git safe in one.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taskyard.errors import TaskyardError

TIMEOUT_S = 300.0
MAX_OUTPUT = 16 * 1024 * 1024
STDERR_TAIL = 8 * 1024
_CHUNK = 64 * 1024
_TERMINATION_GRACE_S = 3.0

ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/nonexistent",
    "LC_ALL": "C",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "/bin/false",
    "GIT_ALLOW_PROTOCOL": "file:http:https",
    "GIT_NO_REPLACE_OBJECTS": "1",
}
"""The whole environment of git on the host, but for what the way to the network needs."""

# How this host reaches the network and whom it trusts; git over HTTP fails without them behind a proxy.
_NETWORK = (
    "http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip

CONFIG: tuple[tuple[str, str], ...] = (
    ("core.hooksPath", "/dev/null"),
    ("core.fsmonitor", "false"),
    ("credential.helper", ""),
    ("fetch.fsckObjects", "true"),
    # Harmless defects of old, widely used histories; a repository that has them must still be usable.
    ("fetch.fsck.badTimezone", "ignore"),
    ("fetch.fsck.missingSpaceBeforeDate", "ignore"),
    ("fetch.fsck.zeroPaddedFilemode", "ignore"),
    ("fetch.recurseSubmodules", "false"),
    # Housekeeping in the foreground: a detached process would outlive the lock of the mirror.
    ("gc.autoDetach", "false"),
    ("maintenance.autoDetach", "false"),
    # A connection that moves less than 1 kB/s for a minute is dead.
    ("http.lowSpeedLimit", "1000"),
    ("http.lowSpeedTime", "60"),
)
"""Configuration of every git on the host, in the scope that wins over files."""


class GitError(TaskyardError):
    """A git command failed."""

    code = "git_failed"

    def __init__(self, detail: str, *, returncode: int | None = None, stderr: str = "") -> None:
        super().__init__(detail)
        self.returncode = returncode
        """Exit status; None if git was stopped by us."""
        self.stderr = stderr
        """Last part of what git said, secrets masked."""


def masked(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without the given secrets, without user names and passwords of URLs, without Authorization."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"(\w+://)[^/\s@']*@", r"\1***@", text)
    return re.sub(r"(?i)(authorization:\s*)[^\r\n]+", r"\1***", text)


def config_environment(config: Iterable[tuple[str, str]]) -> dict[str, str]:
    """git configuration as environment variables: not in a file, and not in argv, which anybody can read."""
    pairs = list(config)
    env = {"GIT_CONFIG_COUNT": str(len(pairs))}
    for index, (key, value) in enumerate(pairs):
        env[f"GIT_CONFIG_KEY_{index}"] = key
        env[f"GIT_CONFIG_VALUE_{index}"] = value
    return env


# What git writes is readable by all, for the uids of sandboxes; the data folder itself keeps strangers out.
# By a shell, because not every event loop can set the mask of a child.
_NOT_FOUND = 127
_READABLE = ("sh", "-c", 'umask 022 && exec "$@"', "sh")
# The locks of mirrors end with the server, so git must, too; at SIGTERM it removes its own locks.
_MORTAL = ("setpriv", "--pdeathsig", "TERM", "--")


async def git(
    *args: str,
    git_dir: Path | None = None,
    config: Sequence[tuple[str, str]] = (),
    env: Mapping[str, str] | None = None,
    secrets: Sequence[str] = (),
    timeout: float = TIMEOUT_S,
    input: bytes | None = None,  # noqa: A002 - the name that subprocess uses
    max_output: int = MAX_OUTPUT,
    truncate: bool = False,
    wrapper: Sequence[str] = (),
) -> bytes:
    """Standard output of `git ARGS`.

    git_dir: the repository, made by this server; named explicitly, so git discovers nothing.
    config, env: on top of CONFIG and ENVIRONMENT. secrets: texts that must not appear in an error.
    timeout: seconds, then git and all it started are stopped. max_output: bytes; more is an error, or,
    with `truncate`, cut off there. wrapper: a command that runs git, such as `prlimit`.
    Raises GitError for a non-zero exit, a timeout, too much output or a missing git.
    """
    full_env = {**ENVIRONMENT, **{name: os.environ[name] for name in _NETWORK if name in os.environ}}
    full_env.update(config_environment((*CONFIG, *config)))
    full_env.update(env or {})
    where = [f"--git-dir={git_dir}"] if git_dir is not None else []
    name = f"git {args[0]}"
    process = await asyncio.create_subprocess_exec(
        *_READABLE, *_MORTAL, *wrapper, "git", *where, *args,
        stdin=asyncio.subprocess.PIPE if input is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=full_env,
        cwd="/",
        start_new_session=True,
    )  # fmt: skip
    errors = asyncio.create_task(_tail(process.stderr))
    feeding = asyncio.create_task(_feed(process.stdin, input))
    finished = False
    try:
        async with asyncio.timeout(timeout):
            output, more = await _read(process.stdout, max_output)
            if more:
                _signal_group(process.pid, signal.SIGKILL)
                await _tail(process.stdout)
            await feeding
            stderr = await errors
            await process.wait()
            finished = True
    except TimeoutError:
        raise GitError(f"{name} did not finish within {timeout:g} seconds and was stopped.") from None
    finally:
        if not finished:
            await _stop(process, errors, feeding)
    if more:
        if truncate:
            return output
        raise GitError(f"{name} wrote more than {max_output} bytes and was stopped.")
    if process.returncode == _NOT_FOUND:
        raise GitError(f"{name}: {(*wrapper, 'git')[0]} is not installed on this host. Install it.")
    if process.returncode != 0:
        said = masked(stderr.decode("utf-8", "replace").strip(), secrets)
        raise GitError(
            f"{name} failed: {said or f'exit status {process.returncode}'}",
            returncode=process.returncode,
            stderr=said,
        )
    return output


async def _read(stream: asyncio.StreamReader | None, limit: int) -> tuple[bytes, bool]:
    """Up to `limit` bytes, and whether there were more."""
    assert stream is not None
    parts: list[bytes] = []
    size = 0
    while chunk := await stream.read(_CHUNK):
        size += len(chunk)
        if size > limit:
            parts.append(chunk[: len(chunk) - (size - limit)])
            return b"".join(parts), True
        parts.append(chunk)
    return b"".join(parts), False


async def _tail(stream: asyncio.StreamReader | None) -> bytes:
    """The last STDERR_TAIL bytes; the stream is read to its end so that its writer never blocks."""
    assert stream is not None
    tail = b""
    while chunk := await stream.read(_CHUNK):
        tail = (tail + chunk)[-STDERR_TAIL:]
    return tail


async def _feed(stream: asyncio.StreamWriter | None, data: bytes | None) -> None:
    if stream is None or data is None:
        return
    try:
        stream.write(data)
        await stream.drain()
    except (BrokenPipeError, ConnectionResetError):
        pass  # git ended before it read everything; its exit status says why
    finally:
        stream.close()


async def _stop(process: asyncio.subprocess.Process, *readers: asyncio.Task[Any]) -> None:
    """End git and what it started. SIGTERM first: git then removes its lock files."""
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    # asyncio reports an exit only after the pipes were read to their ends.
    drains = [asyncio.create_task(_tail(stream)) for stream in (process.stdout, process.stderr)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_group(process.pid, number)
        try:
            async with asyncio.timeout(_TERMINATION_GRACE_S):
                await process.wait()
        except TimeoutError:
            continue
    for drain in drains:
        drain.cancel()
    await asyncio.gather(*drains, return_exceptions=True)


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass
