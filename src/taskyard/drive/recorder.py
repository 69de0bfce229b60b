"""Writes a driver's entries to the record in small batches, under its lease."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import structlog

from taskyard.db.engine import AWAY, Database, raise_cancelled
from taskyard.events import store
from taskyard.events.entries import Entry, Shown
from taskyard.redact import Redactor
from taskyard.runs.store import Lease

BATCH_S = 0.02
"""The longest time an entry waits for company."""
BATCH_BYTES = 64 * 1024
FULL_BYTES = 4 * 1024 * 1024
"""With this much unwritten, whoever produces entries has to wait."""

log = structlog.get_logger()


class Recorder:
    """`add` never blocks; one background task writes, in order, and keeps trying while the database is away."""

    def __init__(
        self,
        database: Database,
        lease: Lease,
        *,
        on_lost: Callable[[], None],
        secrets: Redactor | None = None,
        written: int = 0,
    ) -> None:
        """`written`: the number of an entry that stood before the lease was claimed."""
        self.secrets = secrets or Redactor()
        """What no entry may contain."""
        self._database = database
        self._lease = lease
        self._on_lost = on_lost
        self._waiting: list[Entry] = []
        self._bytes = 0
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._room = asyncio.Event()
        self._room.set()
        self._task = asyncio.create_task(self._write(), name=f"record {lease.run_id}")
        self._written = written
        """Number of our last entry, or of one before our first."""
        self.lost = False
        """Nothing can be written any more: the lease is lost, or a bug stops the writing."""

    def add(self, *entries: Entry) -> None:
        """Put entries behind those already added."""
        if self.lost or not entries:
            return
        for entry in entries:
            if (clean := self.secrets.text(entry.data)) is not entry.data:
                entry = replace(entry, data=clean)  # noqa: PLW2901
            self._waiting.append(entry)
            self._bytes += len(clean)
        self._idle.clear()
        if self._bytes > FULL_BYTES:
            self._room.clear()
        self._news.set()

    async def room(self) -> None:
        """Wait until the backlog is bearable: back-pressure for a flood of output."""
        await self._room.wait()

    async def flush(self) -> None:
        """Wait until everything added so far is written, or nothing can be written any more."""
        await self._idle.wait()

    async def close(self) -> None:
        """Flush, for a bounded time, and stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(30):
                await self.flush()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        last = 0.0
        while True:
            await self._news.wait()
            # An entry after a quiet moment goes out at once; a burst is collected.
            if self._bytes < BATCH_BYTES and (rest := last + BATCH_S - loop.time()) > 0:
                await asyncio.sleep(rest)
            self._news.clear()
            batch, self._waiting, self._bytes = self._waiting, [], 0
            await self._append(batch)
            last = loop.time()
            self._room.set()
            if not self._waiting:
                self._idle.set()

    async def _append(self, batch: list[Entry]) -> None:
        delay, unsure = 0.1, False
        while not self.lost:
            try:
                if unsure and await self._stands(batch):
                    return
                unsure = True
                async with self._database.connection() as connection:
                    self._written = await store.append(
                        connection, self._lease.run_id, batch, generation=self._lease.generation
                    )
            except store.LeaseLostError:
                self.lost = True
                self._on_lost()
            except AWAY as error:
                raise_cancelled()
                log.warning("cannot write events, trying again", error=str(error).strip(), delay=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)
            except Exception:  # a bug: whoever waits for the writing must not wait for ever
                log.exception("writing events failed", run=str(self._lease.run_id))
                self.lost = True
                self._on_lost()
            else:
                return

    async def _stands(self, batch: list[Entry]) -> bool:
        """Whether a batch was written although the answer of the database did not arrive."""
        texts, after = [entry.data for entry in batch], self._written
        while rows := await store.read(
            self._database, self._lease.run_id, Shown.BOTH, after=after, limit=len(batch)
        ):
            # One statement wrote it, so its entries stand side by side; the clients' may stand before it.
            if [row.data for row in rows] == texts:
                self._written = rows[-1].seq
                return True
            after = rows[0].seq
        return False
