"""What dead servers left of sandboxes on this host: folders, processes, control groups, uids.

Who owns what: a folder belongs to the living process that holds its lock, else to whoever will attach it again
(the caller says which those are); everything else belongs to its folder. So nothing alive is ever touched: a
folder is removed only under its own lock, and the rest only when its folder is gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from taskyard.sandbox import identities, strays
from taskyard.sandbox.folder import group_names
from taskyard.sandbox.provider import Kept, Provider, SandboxError, Swept
from taskyard.sandbox.strays import Stray

if TYPE_CHECKING:
    from taskyard.sandbox.bubblewrap import BubblewrapProvider

log = structlog.get_logger()


@dataclass(frozen=True)
class Facts:
    """What there is on this host at one moment."""

    sandboxes: tuple[str, ...] = ()
    """Names of the folders in this data folder."""
    groups: frozenset[str] = frozenset()
    """Control groups of sandboxes, of all servers on this host."""
    folder_groups: frozenset[str] | None = None
    """The groups that have a folder, of all servers; None when that cannot be known, as without root."""
    processes: tuple[Stray, ...] = ()
    """What sees a folder of a sandbox of this data folder."""


@dataclass(frozen=True)
class Leftovers:
    """What may be removed. Of the sandboxes only those that turn out to be free once they are to be locked."""

    sandboxes: tuple[str, ...]
    groups: tuple[str, ...]
    processes: tuple[Stray, ...]


def leftovers(facts: Facts, kept: Set[str]) -> Leftovers:
    """The decision. kept: ids that will be attached again."""
    return Leftovers(
        tuple(name for name in facts.sandboxes if name not in kept),
        () if facts.folder_groups is None else tuple(sorted(facts.groups - facts.folder_groups)),
        tuple(stray for stray in facts.processes if stray.removed),
    )


async def sweep(provider: BubblewrapProvider, kept: Kept) -> Swept:
    """Look, decide, remove. See provider.Provider.sweep."""
    host = await provider.host()
    facts = await asyncio.to_thread(look, provider.root, host.cgroups.names if host.cgroups else set)
    left = leftovers(facts, await kept(facts.sandboxes) if facts.sandboxes else frozenset())
    swept = Swept()
    for stray in left.processes:
        if await done(f"process {stray.pid}", strays.end(provider.root, [stray])):
            swept.processes.append(stray.pid)
    for name in left.groups:
        assert host.cgroups is not None
        if await done(f"control group {name}", host.cgroups.group(name).remove()):
            swept.groups.append(name)
    for name in left.sandboxes:
        if await done(f"sandbox {name}", remove(provider, name, kept)):
            swept.sandboxes.append(name)
    return swept


def look(root: Path, groups: Callable[[], set[str]]) -> Facts:
    """Gather the facts; blocks. Groups come first: one that is made later has a folder that is seen."""
    found = groups()
    # A claim on a uid is made after the folder and before the group, and only servers that are root have claims.
    folders = identities.folders() if os.geteuid() == 0 else None
    with_folder: set[str] = set()
    try:
        names = sorted(path.name for path in root.iterdir())
    except FileNotFoundError:
        names = []
    # Our own also where their claims are gone.
    for folder in (*(folders or ()), *(root / name for name in names)):
        with suppress(FileNotFoundError):
            with_folder.update(group_names(folder))
    return Facts(
        tuple(names),
        frozenset(found),
        None if folders is None else frozenset(with_folder),
        tuple(strays.find(root)),
    )


async def remove(provider: Provider, name: str, kept: Kept) -> bool:
    """Remove a sandbox that nobody holds or keeps; False when somebody else was faster."""
    sandbox = await provider.attach(name)
    if sandbox is None:
        return False
    wanted = True
    try:
        # Asked again now that nobody else can take it: it may have got an owner meanwhile.
        wanted = name in await kept([name])
    finally:
        if wanted:
            await sandbox.detach()
    if not wanted:
        await sandbox.destroy()
    return not wanted


async def done(what: str, work: Coroutine[Any, Any, bool | None]) -> bool:
    """Whether it was done; why not is logged."""
    try:
        return await work is not False
    except (SandboxError, OSError) as error:
        reason = error.detail if isinstance(error, SandboxError) else str(error)
        log.debug("left something alone", what=what, reason=reason)
        return False
