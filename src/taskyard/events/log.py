"""The log: newline-delimited JSON, read from the record (tasks-api §6.2)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from taskyard.events.entries import Filter, Shown
from taskyard.events.record import Record


async def lines(record: Record, run_ids: Sequence[UUID]) -> AsyncIterator[bytes]:
    """The logs of runs, oldest run first: one entry a line, a newline between lines and none at the end."""
    first = True
    for run_id in run_ids:
        async for texts in record.pages(run_id, Shown.LOG):
            text = "\n".join(texts)
            yield (text if first else f"\n{text}").encode()
            first = False


async def array(
    record: Record, run_id: UUID, wanted: Filter, *, last: int, limit: int, offset: int
) -> AsyncIterator[bytes]:
    """Matching entries of one log as a JSON array, each as it was written (tasks-api §6.3)."""
    separator = "["
    async for texts in record.pages(run_id, Shown.LOG, wanted, last=last, limit=limit, offset=offset):
        yield (separator + ", ".join(texts)).encode()
        separator = ", "
    yield b"]" if separator == ", " else b"[]"
