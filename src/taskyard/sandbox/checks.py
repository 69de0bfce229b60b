"""What sandboxes need of this machine, looked at one by one; for `taskyard doctor` and the server's start."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import secrets
import shutil
from pathlib import Path

from taskyard.errors import SetupError, TaskyardError
from taskyard.sandbox import cgroups, seccomp
from taskyard.sandbox.identities import UidRange
from taskyard.sandbox.provider import Limits, Problem, Provider, Spec

MINIMUM = (0, 12, 0)
"""Older versions create folders on the host through links that an agent planted (GHSA-pxhw-h44j-8pfx)."""
_MINIMUM_TEXT = ".".join(map(str, MINIMUM))
_UTIL_LINUX = ("prlimit", "mount", "unshare", "setpriv")
_DEADLINE_S = 60.0
_SMALL = Limits(cpus=1, memory_mb=256, pids=64, tmp_mb=16)

# Value that forbids what we need, and what to do about it.
_SYSCTLS = (
    ("kernel/unprivileged_userns_clone", "0", "run `sysctl kernel.unprivileged_userns_clone=1`"),
    ("user/max_user_namespaces", "0", "run `sysctl user.max_user_namespaces=15000`"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "give bwrap an AppArmor profile, or run `sysctl kernel.apparmor_restrict_unprivileged_userns=0`",
    ),
)


async def bubblewrap() -> Problem:
    """Whether bwrap is there, and new enough."""
    remedy = f"Install bubblewrap {_MINIMUM_TEXT} or newer (Debian, Ubuntu: `apt-get install bubblewrap`)."
    path = shutil.which("bwrap")
    if path is None:
        return Problem("bubblewrap", False, "bwrap is not installed", remedy, fatal=True)
    try:
        process = await asyncio.create_subprocess_exec(
            path, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
    except OSError as error:
        return Problem("bubblewrap", False, f"{path} does not start: {error.strerror}", remedy, fatal=True)
    text = output.decode("utf-8", "replace").strip()
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None or tuple(map(int, found.groups())) < MINIMUM:
        detail = f"{path} is {text or 'of an unknown version'}, which agents can break out of"
        return Problem("bubblewrap", False, detail, remedy, fatal=True)
    return Problem("bubblewrap", True, f"{text}, {path}")


def machine() -> Problem:
    """Whether there is a system-call filter for this processor, and the small programs we start with."""
    name = "sandbox programs"
    if platform.machine() not in seccomp.ARCHITECTURES:
        detail = f"there is no system-call filter for {platform.machine()} processors"
        return Problem(name, False, detail, f"Use one of {', '.join(seccomp.ARCHITECTURES)}.", fatal=True)
    missing = [program for program in _UTIL_LINUX if shutil.which(program) is None]
    if missing:
        return Problem(name, False, f"not installed: {', '.join(missing)}", "Install util-linux.", fatal=True)
    return Problem(name, True, f"util-linux, system-call filter for {platform.machine()}")


def users(uid_range: str) -> Problem:
    """Whether a server that is root has users to run sandboxes as."""
    if os.geteuid() != 0:
        return Problem("sandbox users", True, f"the server's own, uid {os.geteuid()}")
    try:
        uids = UidRange.parse(uid_range)
    except SetupError as error:
        return Problem("sandbox users", False, error.detail, fatal=True)
    return Problem("sandbox users", True, f"one each, of the uids {uids.first} to {uids.last}")


def limits() -> Problem:
    """Whether memory and CPU can be limited. Not fatal: without, a runaway agent can starve the host."""
    try:
        found = cgroups.find()
    except cgroups.UnavailableError as error:
        detail = f"memory and CPU of a sandbox are not limited, processes only roughly: {error}"
        remedy = "Run the server from a systemd unit with `Delegate=cpu memory pids`, or as root."
        return Problem("sandbox limits", False, detail, remedy)
    return Problem(
        "sandbox limits", True, f"control groups, version {found.version}, {found.parents['pids']}"
    )


async def start(provider: Provider) -> Problem:
    """Whether a sandbox really starts."""
    try:
        async with asyncio.timeout(_DEADLINE_S):
            sandbox = await provider.create(Spec(f"check-{secrets.token_hex(8)}", _SMALL))
            try:
                end = await (await sandbox.exec(["/bin/true"])).wait()
            finally:
                await sandbox.destroy()
    except TimeoutError:
        return Problem(
            "sandbox start", False, f"no answer for {_DEADLINE_S:g} seconds", _remedy(), fatal=True
        )
    except (TaskyardError, OSError) as error:
        return Problem("sandbox start", False, str(error), _remedy(), fatal=True)
    if end.code != 0:
        detail = end.stderr_tail.strip() or f"exit status {end.code}"
        return Problem("sandbox start", False, detail, _remedy(), fatal=True)
    return Problem("sandbox start", True, "a command ran in a sandbox")


def require(problem: Problem) -> None:
    """Raises SetupError if it is one."""
    if not problem.ok:
        raise SetupError(f"{problem.name}: {problem.detail}. {problem.remedy}".strip())


def _remedy() -> str:
    for name, bad, what in _SYSCTLS:
        try:
            value = Path("/proc/sys", name).read_text().strip()
        except OSError:
            continue
        if value == bad:
            return f"User namespaces are switched off: as root, {what}."
    return (
        "In a container, start it with `--security-opt seccomp=unconfined --security-opt systempaths=unconfined` "
        "and as an ordinary user."
    )
