"""What a set-up script made, kept on this host for the next run like it: the script then need not run again.

A layer is the home folder of a sandbox after its script, and before any agent. It is used again for the same
environment, unchanged, the same commit of the same repository and the same kind of sandbox, for `runs.setup_cache_s`.
A script that changed the workspace runs each time: what it did there belongs to that workspace. A script that ran in a
workspace that an agent had changed makes no layer: it may have run what the agent wrote.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import structlog

from taskyard.db.engine import Row
from taskyard.drive.inside import CHUNK, run, script
from taskyard.drive.snapshot import SnapshotError, bring_files, taken_files
from taskyard.drive.workspace import Workspace
from taskyard.sandbox.provider import Sandbox, SandboxError

log = structlog.get_logger()

FOLDER = "layers"
SUFFIX = ".tar.gz"
MAX_LAYER = 1024**3
MAX_TOTAL = 20 * 1024**3
LOOK_S = 120.0

_CHANGED = 'find "$1" -newerct "@$2" -print -quit'


def key_of(environment: Row, repository: str | None, workspace: Workspace | None, kind: str) -> str:
    """The name of the layer that fits. kind: what the sandbox is made by, and of."""
    facts = [
        str(environment["id"]),
        environment["updated_at"].isoformat(),
        environment["setup_script"],
        repository,
        None if workspace is None else workspace.base_commit,
        kind,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


async def bring(data_dir: Path, key: str, sandbox: Sandbox, keep_s: float) -> float | None:
    """Unpack a layer in a new sandbox; how many seconds old it is, or None when there is none that is fresh.

    Raises SnapshotError; then the layer is gone.
    """
    path = data_dir / FOLDER / f"{key}{SUFFIX}"
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return None
    if age > keep_s:
        return None
    try:
        await bring_files(sandbox, sandbox.home, _content(path))
    except FileNotFoundError:
        return None
    except SnapshotError:
        path.unlink(missing_ok=True)
        raise
    return max(age, 0.0)


async def now_inside(sandbox: Sandbox) -> str:
    """The time by the clock of the sandbox, for `keep`."""
    code, output, reason = await run(sandbox, script("date +%s.%N"), timeout=LOOK_S)
    if code != 0:
        raise SandboxError(f"the time in the sandbox is not known: {reason}")
    return output.decode("ascii", "replace").strip()


async def keep(data_dir: Path, key: str, sandbox: Sandbox, since: str) -> bool:
    """Keep the home folder as a layer, unless the workspace has changed since the script began.

    What does not work is logged only: the next run then runs its script, too.
    """
    try:
        code, output, reason = await run(sandbox, script(_CHANGED, sandbox.workspace, since), timeout=LOOK_S)
        if code != 0 or output:
            log.debug("a set-up script is not kept", changed=output.decode("utf-8", "replace"), reason=reason)
            return False
        async with taken_files(sandbox, sandbox.home, ["."], "", MAX_LAYER) as taken:
            if taken is None:
                return False
            await asyncio.to_thread(_store, data_dir, taken.path, key)
    except (SnapshotError, SandboxError, OSError) as error:
        log.info("what a set-up script made cannot be kept", reason=str(error))
        return False
    return True


def tidy(data_dir: Path, keep_s: float) -> None:
    """Remove layers that are too old, the oldest of too many bytes, and what was not finished. Blocks."""
    found: list[tuple[float, int, Path]] = []
    with suppress(FileNotFoundError):
        for path in (data_dir / FOLDER).iterdir():
            with suppress(FileNotFoundError):
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
    total = 0
    for changed, size, path in sorted(found, reverse=True):
        total += size
        limit = keep_s if path.name.endswith(SUFFIX) else LOOK_S * 10
        if total > MAX_TOTAL or time.time() - changed > limit:
            path.unlink(missing_ok=True)


def _store(data_dir: Path, source: Path, key: str) -> None:
    folder = data_dir / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    part = folder / f"{key}.{secrets.token_hex(4)}.part"
    try:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
        os.utime(part)
        part.replace(folder / f"{key}{SUFFIX}")
    finally:
        part.unlink(missing_ok=True)


async def _content(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK):
            yield chunk
