"""SQL of the event record.

The cursor row of a run is updated by every append, so appends of one run commit in the order of their
numbers: a reader that has seen number n never misses a smaller one that commits later.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from taskyard.db.engine import Connection, Database
from taskyard.errors import TaskyardError
from taskyard.events.entries import Entry, Shown


class LeaseLostError(TaskyardError):
    """Another worker drives this run now; this one may write nothing more."""

    code = "lease_lost"


APPEND = """
WITH cursor AS (
    UPDATE run_cursors
    SET last_seq = last_seq + cardinality(%(data)s::text[]),
        last_ms = greatest(last_ms, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint)
    WHERE run_id = %(run)s AND (%(generation)s::int IS NULL OR generation = %(generation)s)
    RETURNING last_seq, last_ms
), added AS (
    INSERT INTO events (run_id, seq, at_ms, shown, data)
    SELECT %(run)s, cursor.last_seq - cardinality(%(data)s::text[]) + item.n, cursor.last_ms, item.shown, item.data
    FROM cursor, unnest(%(data)s::text[], %(shown)s::smallint[]) WITH ORDINALITY AS item (data, shown, n)
)
SELECT last_seq, pg_notify('taskyard', 'e:' || %(run)s::text) FROM cursor
"""


async def append(
    connection: Connection, run_id: UUID, entries: Sequence[Entry], *, generation: int | None = None
) -> int:
    """Add entries in order with one statement and one notification; the number of the last one.

    With a generation, only while that generation still holds the run: LeaseLostError otherwise.
    """
    params = {
        "run": run_id,
        "generation": generation,
        "data": [entry.data for entry in entries],
        "shown": [int(entry.shown) for entry in entries],
    }
    row = await (await connection.execute(APPEND, params)).fetchone()
    if row is None:
        raise LeaseLostError
    return int(row["last_seq"])


@dataclass(frozen=True, slots=True)
class Stored:
    """One stored entry; `id` is its event id on the stream (run-lifecycle §7.1)."""

    seq: int
    at_ms: int
    data: str

    @property
    def id(self) -> str:
        return f"{self.at_ms}-{self.seq}"


async def read(database: Database, run_id: UUID, shown: Shown, *, after: int, limit: int) -> list[Stored]:
    """Up to `limit` entries with a number above `after`, in order."""
    rows = await database.fetch(
        "SELECT seq, at_ms, data FROM events"
        " WHERE run_id = %(run)s AND seq > %(after)s AND shown & %(shown)s <> 0 ORDER BY seq LIMIT %(limit)s",
        run=run_id, after=after, shown=int(shown), limit=limit,
    )  # fmt: skip
    return [Stored(row["seq"], row["at_ms"], row["data"]) for row in rows]


PAGE = 1000


async def pages(database: Database, run_id: UUID, shown: Shown) -> AsyncIterator[list[Stored]]:
    """The whole record of a run in pages, never more than one page in memory."""
    after = 0
    while page := await read(database, run_id, shown, after=after, limit=PAGE):
        yield page
        if len(page) < PAGE:
            return
        after = page[-1].seq


async def last_seq(database: Database, run_id: UUID) -> int:
    row = await database.fetch_one("SELECT last_seq FROM run_cursors WHERE run_id = %(run)s", run=run_id)
    return 0 if row is None else int(row["last_seq"])


async def is_over(database: Database, run_id: UUID) -> bool:
    """True when nothing more will come: the run has ended and no worker holds it any more."""
    row = await database.fetch_one(
        "SELECT r.status IN ('completed', 'failed', 'cancelled')"
        " AND (c.leased_until IS NULL OR c.leased_until < clock_timestamp()) AS over"
        " FROM runs r JOIN run_cursors c ON c.run_id = r.id WHERE r.id = %(run)s",
        run=run_id,
    )
    return row is None or bool(row["over"])
