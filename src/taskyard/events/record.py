"""Reading a record, wherever its entries are: the first ones may be archived, the others are in the table.

An entry is in one of the two at any moment. Each page of the table is read with the question whether what it
should have is archived, in one snapshot; so a reader that is overtaken by the archiving goes on in the archive.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from uuid import UUID

from taskyard.db.engine import Database
from taskyard.events import archive, store
from taskyard.events.archive import Archived, Item
from taskyard.events.entries import Filter, Shown
from taskyard.events.store import Counts, Stored
from taskyard.objects.interface import ObjectStore

READS = 4
"""Pages for streams at once in a process: requests must not wait for a connection behind a thousand runs."""
BLOCKS = 4
"""Blocks of archives for streams at once: a slow object storage holds up only those who read what it has."""


@dataclass(frozen=True, slots=True)
class Next:
    """The entries that follow a number, as a stream wants them."""

    items: list[Stored]
    last: int
    """There is nothing else up to this number."""
    over: bool
    """Nothing comes behind them: the run has ended, and no worker holds it."""
    ending: bool
    """The run has ended, and a worker still holds it."""


class Record:
    """The records of all runs. What it raises are StorageError, and the errors of the database."""

    def __init__(self, database: Database, objects: ObjectStore) -> None:
        self._database = database
        self._objects = objects
        self._reads = asyncio.Semaphore(READS)
        self._blocks = asyncio.Semaphore(BLOCKS)

    async def next(self, run_id: UUID, after: int) -> Next:
        """The next entries on the stream above the number `after`: some 64 kB, or a block of the archive."""
        page = await self._page(run_id, after)
        while page.archived is not None:
            async with self._blocks, aclosing(self._archived(page.archived, after)) as blocks:
                async for block in blocks:
                    if found := [_stored(item) for item in block if item.shown & Shown.STREAM.value]:
                        return Next(found, block[-1].seq, over=False, ending=False)
            # Nothing there is for the stream. What comes behind it was written long ago, too: no one tells of it.
            after = page.archived.last_seq
            page = await self._page(run_id, after)
        # Whoever names a number that does not exist yet gets what comes behind it, and nothing before.
        last = page.items[-1].seq if page.more else max(page.newest, after)
        return Next(page.items, last, page.over and not page.more, ending=page.ended and page.held)

    async def _page(self, run_id: UUID, after: int) -> store.Page:
        async with self._reads:
            return await store.page(self._database, run_id, Shown.STREAM, after=after)

    async def pages(
        self,
        run_id: UUID,
        shown: Shown,
        wanted: Filter = store.EVERYTHING,
        *,
        last: int = store.ALL,
        limit: int = store.ALL,
        offset: int = 0,
    ) -> AsyncGenerator[list[str], None]:
        """The texts of `limit` entries that a filter wants, up to the number `last`, after skipping `offset`.

        They come in pieces: never is more than one in memory.
        """
        after = 0
        while limit > 0:
            # A reader that leaves cancels this; without the shield its database connection would be broken off.
            page = await asyncio.shield(
                store.page(
                    self._database, run_id, shown, after=after, wanted=wanted, last=last,
                    limit=limit, offset=offset,
                )
            )  # fmt: skip
            if page.archived is not None:
                async with aclosing(self._archived(page.archived, after)) as blocks:
                    async for block in blocks:
                        items = archive.matching(block, wanted, shown, last)
                        chosen = items[offset : offset + limit]
                        offset = max(0, offset - len(items))
                        limit -= len(chosen)
                        if chosen:
                            yield [item.data for item in chosen]
                        if limit == 0:
                            return
                after = page.archived.last_seq
                continue
            if page.items:
                yield [item.data for item in page.items]
                limit, offset, after = limit - len(page.items), 0, page.items[-1].seq
            if not page.more:
                return

    async def count(self, run_id: UUID, wanted: Filter) -> Counts:
        """What the log of a run has, and how much of it a filter wants."""
        counts, archived = await store.count(self._database, run_id, wanted)
        if archived is None:
            return counts
        matching, last = archived.log_entries, archived.last_seq
        if wanted != store.EVERYTHING:
            matching = 0
            async with aclosing(self._archived(archived, 0)) as blocks:
                async for block in blocks:
                    matching += len(archive.matching(block, wanted, Shown.LOG, last))
        return Counts(counts.total + archived.log_entries, counts.matching + matching, max(counts.last, last))

    async def has_log(self, run_id: UUID) -> bool:
        """Whether the log of a run has an entry."""
        return await store.has_log(self._database, run_id)

    def _archived(self, archived: Archived, after: int) -> AsyncGenerator[list[Item], None]:
        return archive.blocks(self._objects, archived, after)


def _stored(item: Item) -> Stored:
    return Stored(item.seq, item.at_ms, item.data)
