"""What sandboxes need of the container engine, looked at one by one; for `taskyard doctor` and the worker's start."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import TYPE_CHECKING, Any

from taskyard.errors import SetupError, TaskyardError
from taskyard.sandbox.docker_engine import EngineError
from taskyard.sandbox.image_checks import PROGRAMS, said
from taskyard.sandbox.provider import Limits, Problem, Spec

if TYPE_CHECKING:
    from taskyard.sandbox.docker import DockerProvider

DEADLINE_S = 120.0
_LIMITS = Limits(cpus=0.5, memory_mb=200, pids=64, tmp_mb=16)
_REBUILD = "Build the image again by the recipe in deploy/agent-image, or add what is missing to yours."

# What an image must have, and what really limits a process in there, as JSON on one line.
_LOOK = """
import json, os, pwd, shutil, sys
def read(*names):
    for name in names:
        try:
            with open("/sys/fs/cgroup/" + name) as file:
                return file.read().strip()
        except OSError:
            pass
    return None
try:
    user = pwd.getpwuid(os.getuid()).pw_name
except KeyError:
    user = None
print(json.dumps({
    "missing": [name for name in sys.argv[1:] if shutil.which(name) is None],
    "python": list(sys.version_info[:2]),
    "user": user,
    "memory": read("memory.max", "memory/memory.limit_in_bytes"),
    "pids": read("pids.max", "pids/pids.max"),
    "cpu": read("cpu.max", "cpu/cpu.cfs_quota_us"),
}))
"""


async def check(provider: DockerProvider) -> list[Problem]:
    """Engine, image, and what a sandbox of it has; each only if the one before is there."""
    engine = await _engine(provider)
    if not engine.ok:
        return [engine]
    image = await _image(provider)
    if not image.ok:
        return [engine, image]
    try:
        found = await _look(provider)
    except (TaskyardError, OSError, TimeoutError, ValueError) as error:
        detail = str(error) or f"no answer for {DEADLINE_S:g} seconds"
        return [engine, image, Problem("sandbox start", False, detail, _REBUILD, fatal=True)]
    return [
        engine,
        image,
        Problem("sandbox start", True, "a command ran in a container"),
        _programs(found),
        _user(found),
        _limits(provider, found),
    ]


async def _engine(provider: DockerProvider) -> Problem:
    name = "container engine"
    try:
        await provider.capabilities()
    except SetupError as error:
        return Problem(name, False, error.detail, fatal=True)
    facts = provider.facts_of_engine
    kernel = f", runtime {provider.settings.runtime}" if provider.settings.runtime else ""
    files = "copied in" if provider.copies else "mounted"
    detail = f"version {facts.version} at {provider.engine.host}{kernel}; files of this host are {files}"
    return Problem(name, True, detail)


async def _image(provider: DockerProvider) -> Problem:
    from taskyard.sandbox.docker import how_to_get

    name = provider.settings.image
    try:
        found = await provider.engine.image(name)
    except EngineError as error:
        if not error.missing:
            return Problem("sandbox image", False, error.detail, fatal=True)
        remedy = how_to_get(name)
        remedy = f"{remedy[0].upper()}{remedy[1:]} in TASKYARD_SANDBOX__DOCKER__IMAGE."
        return Problem("sandbox image", False, f"the engine has no image {name!r}", remedy, fatal=True)
    return Problem("sandbox image", True, f"{name}, {str(found.get('Id', '')).removeprefix('sha256:')[:12]}")


async def _look(provider: DockerProvider) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        sandbox = await provider.create(Spec(f"check-{secrets.token_hex(8)}", _LIMITS))
        try:
            return dict(json.loads(await said(sandbox, "python3", "-I", "-S", "-c", _LOOK, *PROGRAMS)))
        finally:
            await sandbox.destroy()


def _programs(found: dict[str, Any]) -> Problem:
    if found["missing"]:
        detail = f"not in the image: {', '.join(found['missing'])}"
        return Problem("sandbox programs", False, detail, _REBUILD, fatal=True)
    version = ".".join(map(str, found["python"]))
    if found["python"] < [3, 9]:
        return Problem("sandbox programs", False, f"Python {version} is too old", _REBUILD, fatal=True)
    return Problem("sandbox programs", True, f"{', '.join(PROGRAMS)}; Python {version}")


def _user(found: dict[str, Any]) -> Problem:
    if found["user"] is None:
        detail = "uid 1000 has no entry in the image's /etc/passwd, which some programs need"
        return Problem("sandbox user", False, detail, "Add one: `RUN useradd -u 1000 -d /home/agent agent`.")
    return Problem("sandbox user", True, f"uid 1000, {found['user']}")


def _limits(provider: DockerProvider, found: dict[str, Any]) -> Problem:
    """A kernel of its own shows no control groups, or ones that it makes up; then there is the engine's word only."""
    name = "sandbox limits"
    missing = sorted({"memory", "cpu", "pids"} - provider.facts_of_engine.limits)
    memory, pids, cpu = (None if provider.own_kernel else found[key] for key in ("memory", "pids", "cpu"))
    if memory is not None and int(memory if memory.isdigit() else 2**63) > _LIMITS.memory_mb * 2**20:
        missing.append("memory")
    if pids is not None and pids != str(_LIMITS.pids):
        missing.append("pids")
    if cpu is not None and cpu.split()[0] in ("max", "-1"):
        missing.append("cpu")
    if missing:
        detail = f"the engine does not limit: {', '.join(sorted(set(missing)))}"
        remedy = "Give it control groups: an engine without root needs delegated ones (cgroup v2, systemd)."
        return Problem(name, False, detail, remedy)
    seen = "" if memory is None else ", as seen from inside"
    return Problem(name, True, f"memory, processor time and processes are limited{seen}")
