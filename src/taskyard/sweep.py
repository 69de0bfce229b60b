"""At the start of a worker and every minute: what dead servers left on this host and in the database is removed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import structlog

from taskyard import jobs
from taskyard.agents import install
from taskyard.db.engine import AWAY, Database, raise_cancelled
from taskyard.drive import layers
from taskyard.forge import git
from taskyard.objects.interface import ObjectStore, StorageError
from taskyard.runs import store as runs
from taskyard.sandbox.provider import Provider, SandboxError
from taskyard.settings import Settings

log = structlog.get_logger()

SWEEP_S = 60.0


class Sweeper:
    """What one worker sweeps. `place` names its data folder (sandbox/place.py)."""

    def __init__(
        self,
        provider: Provider,
        database: Database,
        objects: ObjectStore,
        settings: Settings,
        place: str,
    ) -> None:
        data_dir = settings.data_dir
        self._provider = provider
        self._database = database
        self._place = place
        self._steps: dict[str, Callable[[], Awaitable[object]]] = {
            "sandboxes": self._sweep_sandboxes,
            "mirrors": lambda: git.remove_unfinished(data_dir),
            "layers": lambda: asyncio.to_thread(layers.tidy, data_dir, settings.runs.setup_cache_s),
            "agents": lambda: asyncio.to_thread(install.remove_unfinished, data_dir),
            "uploads": objects.tidy,
            "jobs": lambda: jobs.forget_lost(database),
        }

    async def keep(self) -> None:
        """Sweep now and every minute, until cancelled."""
        while True:
            await self.sweep()
            await asyncio.sleep(SWEEP_S)

    async def sweep(self) -> None:
        """Sweep once; what fails is logged and done by the next one. Any number of workers may do so at once."""
        for what, step in self._steps.items():
            try:
                await step()
            except (StorageError, SandboxError, OSError, *AWAY) as error:
                raise_cancelled()
                log.warning("cannot sweep, trying again later", what=what, error=str(error).strip())

    async def _sweep_sandboxes(self) -> None:
        swept = await self._provider.sweep(self._kept)
        if removed := {kind: names for kind, names in vars(swept).items() if names}:
            log.info("removed what dead servers left", **removed)

    async def _kept(self, names: Collection[str]) -> set[str]:
        return await runs.driven_here(self._database, self._place, names)
