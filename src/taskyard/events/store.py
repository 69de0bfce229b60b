"""SQL of the event record.

The cursor row of a run is updated by every append, so appends of one run commit in the order of their
numbers: a reader that has seen number n never misses a smaller one that commits later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from taskyard.db.engine import Connection, Database, Row
from taskyard.errors import TaskyardError
from taskyard.events.entries import Entry, Shown


class LeaseLostError(TaskyardError):
    """Another worker drives this run now; this one may write nothing more."""

    code = "lease_lost"


APPEND = """
WITH cursor AS (
    UPDATE run_cursors
    SET last_seq = last_seq + cardinality(%(data)s::text[]),
        last_ms = greatest(last_ms, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint),
        heartbeat_at = CASE WHEN %(heartbeat)s THEN clock_timestamp() ELSE heartbeat_at END
    WHERE run_id = %(run)s AND (%(generation)s::int IS NULL OR generation = %(generation)s)
    RETURNING last_seq, last_ms
), added AS (
    INSERT INTO events (run_id, seq, at_ms, shown, data, kind, stamp)
    SELECT %(run)s, cursor.last_seq - cardinality(%(data)s::text[]) + item.n, cursor.last_ms, item.shown,
        item.data, item.kind, item.stamp
    FROM cursor, unnest(%(data)s::text[], %(shown)s::smallint[], %(kind)s::text[], %(stamp)s::timestamptz[])
        WITH ORDINALITY AS item (data, shown, kind, stamp, n)
)
SELECT last_seq, CASE WHEN %(streamed)s THEN pg_notify('taskyard', 'e:' || %(run)s::text) END FROM cursor
"""


async def append(
    connection: Connection,
    run_id: UUID,
    entries: Sequence[Entry],
    *,
    generation: int | None = None,
    heartbeat: bool = False,
) -> int:
    """Add entries in order with one statement and one notification; the number of the last one.

    With a generation, only while that generation still holds the run: LeaseLostError otherwise. A heartbeat
    says that somebody outside works on the run: its clock of inactivity starts again.
    """
    logged = [bool(entry.shown & Shown.LOG) for entry in entries]
    params = {
        "run": run_id,
        "generation": generation,
        "heartbeat": heartbeat,
        "streamed": any(entry.shown & Shown.STREAM for entry in entries),
        "data": [entry.data for entry in entries],
        "shown": [int(entry.shown) for entry in entries],
        "kind": [entry.kind if log else None for entry, log in zip(entries, logged, strict=True)],
        "stamp": [entry.stamp if log else None for entry, log in zip(entries, logged, strict=True)],
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


PAGE = 250


async def pages(database: Database, run_id: UUID, shown: Shown) -> AsyncIterator[list[Stored]]:
    """The whole record of a run in pages, never more than one page in memory."""
    after = 0
    # A reader that leaves cancels this; without the shield its database connection would be broken off with it.
    while page := await asyncio.shield(read(database, run_id, shown, after=after, limit=PAGE)):
        yield page
        if len(page) < PAGE:
            return
        after = page[-1].seq


@dataclass(frozen=True, slots=True)
class Filter:
    """Which entries of a log a reader wants (tasks-api §6.3)."""

    after: datetime | None = None
    """Only entries with a later time."""
    kinds: list[str] = field(default_factory=list)
    """Only these kinds; empty: all."""
    without: list[str] = field(default_factory=list)


MATCHES: LiteralString = (
    "(%(after)s::timestamptz IS NULL OR stamp > %(after)s)"
    " AND (cardinality(%(kinds)s::text[]) = 0 OR coalesce(kind, '') = ANY(%(kinds)s::text[]))"
    " AND coalesce(kind, '') <> ALL(%(without)s::text[])"
)


def _matching(run_id: UUID, wanted: Filter) -> dict[str, Any]:
    return {"run": run_id, "after": wanted.after, "kinds": wanted.kinds, "without": wanted.without}


@dataclass(frozen=True, slots=True)
class Counts:
    """How many entries a log has, how many match a filter, and the number of the last one."""

    total: int
    matching: int
    last: int


async def count(database: Database, run_id: UUID, wanted: Filter) -> Counts:
    row = await database.fetch_one(
        "SELECT count(*) AS total, count(*) FILTER (WHERE "
        + MATCHES
        + ") AS matching, coalesce(max(seq), 0) AS last FROM events WHERE run_id = %(run)s AND shown & 1 <> 0",
        **_matching(run_id, wanted),
    )
    assert row is not None
    return Counts(row["total"], row["matching"], row["last"])


async def matching(
    database: Database, run_id: UUID, wanted: Filter, *, last: int, limit: int, offset: int
) -> AsyncIterator[list[str]]:
    """The texts of `limit` matching entries up to the number `last`, in pieces, after skipping `offset`."""
    query: LiteralString = (
        "SELECT seq, data FROM events WHERE run_id = %(run)s AND seq > %(above)s AND seq <= %(last)s"
        " AND shown & 1 <> 0 AND " + MATCHES + " ORDER BY seq LIMIT %(limit)s OFFSET %(offset)s"
    )
    params = _matching(run_id, wanted) | {"above": 0, "last": last}
    while limit > 0:
        size = min(limit, PAGE)
        rows: list[Row] = await asyncio.shield(database.fetch(query, **params, limit=size, offset=offset))
        if rows:
            yield [row["data"] for row in rows]
        if len(rows) < size:
            return
        limit, offset, params["above"] = limit - size, 0, rows[-1]["seq"]


async def has_turns(database: Database, run_id: UUID) -> bool:
    """Whether a person and an agent have talked in this run, as its log has it."""
    row = await database.fetch_one(
        "SELECT 1 FROM events WHERE run_id = %(run)s AND shown & 1 <> 0"
        " AND kind IN ('session/prompt', 'user_message', 'user_message_chunk', 'agent_message') LIMIT 1",
        run=run_id,
    )
    return row is not None


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


# --- upload of events (tasks-api §6.8) -------------------------------------------------------------------


async def ingested(connection: Connection, run_id: UUID) -> tuple[int, bool]:
    """The last accepted number and whether the upload is complete; locked until the transaction ends."""
    row = await (
        await connection.execute(
            "SELECT ingest_seq, ingest_done FROM run_cursors WHERE run_id = %(run)s FOR NO KEY UPDATE",
            {"run": run_id},
        )
    ).fetchone()
    assert row is not None
    return row["ingest_seq"], row["ingest_done"]


async def set_ingested(connection: Connection, run_id: UUID, last: int, *, done: bool) -> None:
    await connection.execute(
        "UPDATE run_cursors SET ingest_seq = %(last)s, ingest_done = ingest_done OR %(done)s WHERE run_id = %(run)s",
        {"run": run_id, "last": last, "done": done},
    )


async def last_ingested(database: Database, run_id: UUID) -> int:
    """The number of the last uploaded event that was accepted."""
    row = await database.fetch_one("SELECT ingest_seq FROM run_cursors WHERE run_id = %(run)s", run=run_id)
    return 0 if row is None else int(row["ingest_seq"])
