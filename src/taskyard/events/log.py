"""The log: newline-delimited JSON, read from the record (tasks-api §6.2)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from taskyard.db.engine import Database
from taskyard.events import store
from taskyard.events.entries import Shown


async def lines(database: Database, run_ids: Sequence[UUID]) -> AsyncIterator[bytes]:
    """The logs of runs, oldest run first: one entry a line, a newline between lines and none at the end."""
    first = True
    for run_id in run_ids:
        async for page in store.pages(database, run_id, Shown.LOG):
            text = "\n".join(item.data for item in page)
            yield (text if first else f"\n{text}").encode()
            first = False


async def array(
    database: Database, run_id: UUID, wanted: store.Filter, *, last: int, limit: int, offset: int
) -> AsyncIterator[bytes]:
    """Matching entries of one log as a JSON array, each as it was written (tasks-api §6.3)."""
    separator = "["
    async for texts in store.matching(database, run_id, wanted, last=last, limit=limit, offset=offset):
        yield (separator + ", ".join(texts)).encode()
        separator = ", "
    yield b"]" if separator == ", " else b"[]"
