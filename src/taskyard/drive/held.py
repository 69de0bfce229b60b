"""A run that this worker holds: everything that is read and written of it goes under its lease."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from taskyard.commands import store as commands
from taskyard.commands.store import Letter
from taskyard.db.engine import AWAY, Database, Row, raise_cancelled
from taskyard.db.hub import Hub, Wake
from taskyard.drive.failures import storable
from taskyard.drive.recorder import Recorder
from taskyard.runs import lifecycle
from taskyard.runs import store as runs
from taskyard.runs.store import Lease
from taskyard.sandbox.provider import Provider
from taskyard.settings import Settings
from taskyard.tasks.present import as_object

log = structlog.get_logger()
T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """What every driver of a worker shares."""

    settings: Settings
    database: Database
    hub: Hub
    provider: Provider
    worker: str


class HeldRun:
    def __init__(self, parts: Parts, lease: Lease, wake: Wake) -> None:
        self.parts = parts
        self.lease = lease
        self.run_id = str(lease.run_id)
        self._wake = wake
        self.recorder = Recorder(parts.database, lease, on_lost=wake.set)
        self._renewal = asyncio.create_task(self._renew(), name=f"lease {self.run_id}")
        self._row: Row = {}

    async def _renew(self) -> None:
        held, wait = True, runs.LEASE_S / 3
        while held:
            await asyncio.sleep(wait)
            try:
                held = await runs.renew(self.parts.database, self.lease)
                wait = runs.LEASE_S / 3
            except AWAY:
                raise_cancelled()
                wait = min(wait, 1.0)
        self.recorder.lost = True
        self._wake.set()

    async def _change(self, **changes: Any) -> None:
        """Change the run under the lease, behind everything that was recorded before."""
        await self.recorder.flush()

        async def change() -> Row:
            async with self.parts.database.transaction() as connection:
                return await lifecycle.change(connection, self.lease.run_id, lease=self.lease, **changes)

        self._keep(await self._patiently(change))

    async def _end_of_work(self, **changes: Any) -> bool:
        """Complete the run, unless a message waits. Who sends one locks the run, as is done here: none is lost."""
        await self.recorder.flush()

        async def end() -> Row | None:
            async with self.parts.database.transaction() as connection:
                await runs.lock(connection, self.lease.run_id)
                if await commands.message_waits(connection, self.lease.run_id):
                    return None
                return await lifecycle.change(
                    connection, self.lease.run_id, lease=self.lease, status="completed", **changes
                )

        saved = await self._patiently(end)
        if saved is not None:
            self._keep(saved)
        return saved is not None

    def _keep(self, saved: Row) -> None:
        self._row.update({name: saved[name] for name in ("status", "branch", "output")})
        self._row["state"] = as_object(saved["state"])

    async def _take(self, *methods: str) -> list[Letter]:
        """The next command of these methods, if one waits."""
        return await self._patiently(lambda: commands.take(self.parts.database, self.lease, methods, limit=1))

    async def _answer(self, letter: Letter, *, result: Any = None, error: str | None = None) -> None:
        said = None if error is None else self._shown(error)
        await self._patiently(
            lambda: commands.answer(
                self.parts.database, self.lease, letter.seq, result=storable(result), error=said
            )
        )

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Ask the database, again and again while it is away: an outage ends no run."""
        delay = 0.1
        while True:
            try:
                return await work()
            except AWAY as error:
                raise_cancelled()
                log.warning("a run waits for the database", run=self.run_id, error=str(error).strip())
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)

    def _shown(self, text: str) -> str:
        """A text of ours for the record: without places on this host, and without NUL, which PostgreSQL refuses."""
        return str(storable(text)).replace(str(self.parts.settings.data_dir), "…")
