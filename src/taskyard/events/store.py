"""SQL of the event record.

The cursor row of a run is updated by every append, so appends of one run commit in the order of their
numbers: a reader that has seen number n never misses a smaller one that commits later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

import msgspec

from taskyard.db.engine import Connection, Database
from taskyard.errors import TaskyardError
from taskyard.events.archive import Archived
from taskyard.events.entries import Entry, Filter, Shown, encode


class LeaseLostError(TaskyardError):
    """Another worker drives this run now; this one may write nothing more."""

    code = "lease_lost"


# The entries are one JSON text, because a list of texts costs the driver a hundred times as much.
APPEND: LiteralString = """
WITH cursor AS (
    UPDATE run_cursors
    SET last_seq = last_seq + %(count)s,
        last_ms = greatest(last_ms, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint),
        heartbeat_at = CASE WHEN %(heartbeat)s THEN clock_timestamp() ELSE heartbeat_at END
    WHERE run_id = %(run)s AND (%(generation)s::int IS NULL OR generation = %(generation)s)
    RETURNING last_seq, last_ms
), added AS (
    INSERT INTO events (run_id, seq, at_ms, shown, data, kind, stamp)
    SELECT %(run)s, cursor.last_seq - %(count)s + item.n, cursor.last_ms, item.shown,
        item.data, item.kind, item.stamp
    FROM cursor, ROWS FROM (
        json_to_recordset(%(items)s::json) AS (data text, shown smallint, kind text, stamp timestamptz)
    ) WITH ORDINALITY AS item (data, shown, kind, stamp, n)
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
    params = {
        "run": run_id,
        "generation": generation,
        "heartbeat": heartbeat,
        "streamed": any(int(entry.shown) & _STREAM for entry in entries),
        "count": len(entries),
        "items": msgspec.json.encode([_item(entry) for entry in entries]).decode(),
    }
    row = await (await connection.execute(APPEND, params)).fetchone()
    if row is None:
        raise LeaseLostError
    return int(row["last_seq"])


# Plain numbers: operators and attributes of flags are slow.
_LOG, _STREAM = int(Shown.LOG), int(Shown.STREAM)


def _item(entry: Entry) -> dict[str, Any]:
    item: dict[str, Any] = {"data": entry.data, "shown": int(entry.shown)}
    if item["shown"] & _LOG:
        item["kind"] = entry.kind
        item["stamp"] = entry.stamp
    return item


@dataclass(frozen=True, slots=True)
class Stored:
    """One stored entry; `id` is its event id on the stream (run-lifecycle §7.1)."""

    seq: int
    at_ms: int
    data: str

    @property
    def id(self) -> str:
        return f"{self.at_ms}-{self.seq}"


PAGE = 250
"""Entries; it stands in READ, too."""
PAGE_BYTES = 64 * 1024
ALL = 2**63 - 1
EVERYTHING = Filter()

MATCHES: LiteralString = (
    "(%(stamped)s::timestamptz IS NULL OR stamp > %(stamped)s)"
    " AND (cardinality(%(kinds)s::text[]) = 0 OR coalesce(kind, '') = ANY(%(kinds)s::text[]))"
    " AND coalesce(kind, '') <> ALL(%(without)s::text[])"
)

READ: LiteralString = (
    "SELECT c.last_seq AS newest, r.status IN ('completed', 'failed', 'cancelled') AS ended,"
    " coalesce(c.leased_until >= clock_timestamp(), false) AS held, to_json(a) AS archived,"
    " e.seq, e.at_ms, e.data, e.found"
    " FROM runs r JOIN run_cursors c ON c.run_id = r.id"
    " LEFT JOIN archived_events a ON a.run_id = r.id AND a.last_seq > %(after)s"
    " LEFT JOIN LATERAL ("
    "SELECT seq, at_ms, data, count(*) OVER () AS found,"
    # The length is known without reading a long text.
    " sum(octet_length(data)) OVER (ORDER BY seq) - octet_length(data) AS bytes_before FROM ("
    "SELECT seq, at_ms, data FROM events WHERE run_id = r.id AND a.run_id IS NULL"
    " AND seq > %(after)s AND seq <= %(last)s AND shown & %(shown)s <> 0 AND "
    + MATCHES
    # A number in the text, so that the planner knows how few rows are wanted.
    + " ORDER BY seq LIMIT 250"
)
READ_REST: LiteralString = ") found) e ON e.bytes_before < %(bytes)s WHERE r.id = %(run)s ORDER BY e.seq"


@dataclass(frozen=True, slots=True)
class Page:
    """The next entries of a record, and what is known of it at the same moment."""

    items: list[Stored]
    more: bool
    """There are entries behind these."""
    newest: int
    """The number of the newest entry of the whole record."""
    ended: bool
    """The run has ended."""
    held: bool
    """A worker still has it."""
    archived: Archived | None
    """Where the next entries are instead of in the table; then `items` is empty."""

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.ended and not self.held


async def page(
    database: Database,
    run_id: UUID,
    shown: Shown,
    *,
    after: int,
    limit: int = PAGE,
    wanted: Filter = EVERYTHING,
    last: int = ALL,
    offset: int = 0,
) -> Page:
    """Up to `limit` entries above the number `after`, of about PAGE_BYTES, one at least. One statement, one snapshot.

    For the events room itself: everybody else reads through `record.Record`, which also knows the archive.
    """
    rows = await database.fetch(
        READ + " OFFSET %(offset)s" + READ_REST if offset else READ + READ_REST,
        **_matching(run_id, wanted),
        shown=int(shown), after=after, last=last, offset=offset, bytes=PAGE_BYTES,
    )  # fmt: skip
    if not rows:
        return Page([], False, after, True, False, None)
    first = rows[0]
    archived = None if first["archived"] is None else msgspec.convert(first["archived"], Archived)
    if first["seq"] is None:
        return Page([], False, first["newest"], first["ended"], first["held"], archived)
    items = [Stored(row["seq"], row["at_ms"], row["data"]) for row in rows[:limit]]
    more = len(items) < first["found"] or first["found"] == PAGE
    return Page(items, more, first["newest"], first["ended"], first["held"], archived)


async def read(database: Database, run_id: UUID, shown: Shown, *, after: int, limit: int) -> list[Stored]:
    """Up to `limit` entries of a run that goes on, above the number `after`, in order; nothing that is archived."""
    rows = await database.fetch(
        "SELECT seq, at_ms, data FROM events"
        " WHERE run_id = %(run)s AND seq > %(after)s AND shown & %(shown)s <> 0 ORDER BY seq LIMIT %(limit)s",
        run=run_id, after=after, shown=int(shown), limit=limit,
    )  # fmt: skip
    return [Stored(row["seq"], row["at_ms"], row["data"]) for row in rows]


async def last_prompt(database: Database, run_id: UUID) -> Stored | None:
    """What the driver of a run last told its agent. Clients write for the log or for the stream, never for both."""
    row = await database.fetch_one(
        "SELECT seq, at_ms, data FROM events WHERE run_id = %(run)s AND shown = 3 AND kind = 'session/prompt'"
        " ORDER BY seq DESC LIMIT 1",
        run=run_id,
    )
    return None if row is None else Stored(row["seq"], row["at_ms"], row["data"])


async def last_joined(
    database: Database, run_id: UUID, kinds: Sequence[str], session_id: str, *, after: int
) -> int:
    """The number of the last entry of these kinds for the log alone, of a session, above `after`; else that."""
    row = await database.fetch_one(
        "SELECT max(seq) AS seq FROM events WHERE run_id = %(run)s AND shown = 1 AND kind = ANY(%(kinds)s)"
        # As text, since a client may have put anything there; within a string the quotes would be escaped.
        " AND seq > %(after)s AND strpos(data, %(session)s) > 0",
        run=run_id, kinds=list(kinds), after=after, session=f'"sessionId": {encode(session_id)}',
    )  # fmt: skip
    return after if row is None or row["seq"] is None else int(row["seq"])


async def streamed_since(database: Database, run_id: UUID, *, after: int, limit: int) -> list[Stored]:
    """Up to `limit` entries for the stream alone, above `after`."""
    rows = await database.fetch(
        "SELECT seq, at_ms, data FROM events WHERE run_id = %(run)s AND shown = 2 AND seq > %(after)s"
        " ORDER BY seq LIMIT %(limit)s",
        run=run_id, after=after, limit=limit,
    )  # fmt: skip
    return [Stored(row["seq"], row["at_ms"], row["data"]) for row in rows]


def _matching(run_id: UUID, wanted: Filter) -> dict[str, Any]:
    return {"run": run_id, "stamped": wanted.after, "kinds": wanted.kinds, "without": wanted.without}


@dataclass(frozen=True, slots=True)
class Counts:
    """How many entries a log has, how many match a filter, and the number of the last one."""

    total: int
    matching: int
    last: int


async def count(database: Database, run_id: UUID, wanted: Filter) -> tuple[Counts, Archived | None]:
    """Counts of what is in the table, and what is archived at the same moment."""
    row = await database.fetch_one(
        "SELECT t.*, to_json(a) AS archived FROM (SELECT count(*) AS total, count(*) FILTER (WHERE "
        + MATCHES
        + ") AS matching, coalesce(max(seq), 0) AS last FROM events WHERE run_id = %(run)s AND shown & 1 <> 0) t"
        " LEFT JOIN archived_events a ON a.run_id = %(run)s",
        **_matching(run_id, wanted),
    )
    assert row is not None
    archived = None if row["archived"] is None else msgspec.convert(row["archived"], Archived)
    return Counts(row["total"], row["matching"], row["last"]), archived


TALK: LiteralString = "('session/prompt', 'user_message', 'user_message_chunk', 'agent_message')"
"""Kinds of entries in which a person and an agent talk."""


async def has_turns(database: Database, run_id: UUID) -> bool:
    """Whether a person and an agent have talked in this run, as its log has it."""
    row = await database.fetch_one(
        "SELECT 1 FROM events WHERE run_id = %(run)s AND shown & 1 <> 0 AND kind IN "
        + TALK
        + " UNION ALL SELECT 1 FROM archived_events WHERE run_id = %(run)s AND talked LIMIT 1",
        run=run_id,
    )
    return row is not None


async def has_log(database: Database, run_id: UUID) -> bool:
    """Whether the log of a run has an entry."""
    row = await database.fetch_one(
        "SELECT 1 FROM events WHERE run_id = %(run)s AND shown & 1 <> 0"
        " UNION ALL SELECT 1 FROM archived_events WHERE run_id = %(run)s AND log_entries > 0 LIMIT 1",
        run=run_id,
    )
    return row is not None


async def last_seq(database: Database, run_id: UUID) -> int:
    row = await database.fetch_one("SELECT last_seq FROM run_cursors WHERE run_id = %(run)s", run=run_id)
    return 0 if row is None else int(row["last_seq"])


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
