"""SQL of archiving: which records are due, taking entries out of the table, and what is removed in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString
from uuid import UUID

import msgspec

from taskyard.db.engine import Connection, Database, Row
from taskyard.events.archive import BLOCK_BYTES, Archived, Item
from taskyard.events.store import TALK


class MismatchError(Exception):
    """The table does not have what was archived: nothing is taken out of it."""


ENDED: LiteralString = "('completed', 'failed', 'cancelled')"
PAGE = 500
SPARE: LiteralString = "interval '1 day'"
"""How long an object is kept that is not the archive yet, or not any more: somebody may still read it."""

QUIET: LiteralString = (
    "r.status IN " + ENDED + " AND r.completed_at < clock_timestamp() - make_interval(secs => %(after)s)"
    " AND c.last_ms < (extract(epoch FROM clock_timestamp()) - %(after)s) * 1000"
    " AND (c.leased_until IS NULL OR c.leased_until < clock_timestamp())"
)
"""The run has ended, nobody holds it, and nothing was written for a while."""


async def stored(database: Database, above: UUID, after_s: float) -> list[Row]:
    """The next runs with entries in the table, by id (`run_id`), and whether they are `due`; at most PAGE.

    The table has the runs of the moment only, so its index is walked from run to run.
    """
    query: LiteralString = (
        "WITH RECURSIVE found AS ("
        "(SELECT run_id, 1 AS n FROM events WHERE run_id > %(above)s ORDER BY run_id LIMIT 1)"
        " UNION ALL SELECT (SELECT e.run_id FROM events e WHERE e.run_id > f.run_id ORDER BY e.run_id LIMIT 1), f.n + 1"
        " FROM found f WHERE f.run_id IS NOT NULL AND f.n < %(page)s)"
        " SELECT f.run_id, " + QUIET + " AS due FROM found f JOIN runs r ON r.id = f.run_id"
        " JOIN run_cursors c ON c.run_id = f.run_id ORDER BY f.run_id"
    )
    return await database.fetch(query, above=above, after=after_s, page=PAGE)


async def begin(connection: Connection, run_id: UUID, after_s: float) -> Row | None:
    """What is to be archived of a run that is due: up to `last_seq`, behind what is `archived`; None when it is not."""
    query: LiteralString = (
        "SELECT r.task_id, c.last_seq, to_json(a) AS archived FROM runs r JOIN run_cursors c ON c.run_id = r.id"
        " LEFT JOIN archived_events a ON a.run_id = r.id WHERE r.id = %(run)s AND " + QUIET
    )
    return await (await connection.execute(query, {"run": run_id, "after": after_s})).fetchone()


async def expect(connection: Connection, task_id: UUID, key: str) -> None:
    """An object comes under this key; unless it becomes the archive, it goes after a day (artifacts/retention.py)."""
    await connection.execute(
        "INSERT INTO stored_objects (key, task_id, keep_until)"
        " VALUES (%(key)s, %(task)s, clock_timestamp() + " + SPARE + ")",
        {"key": key, "task": task_id},
    )


async def block(database: Database, run_id: UUID, above: int, last: int) -> list[Item]:
    """The next entries in the table, for one block."""
    rows = await database.fetch(
        "SELECT * FROM (SELECT seq, at_ms, shown, kind, (extract(epoch FROM stamp) * 1000000)::bigint AS stamp, data,"
        " sum(octet_length(data)) OVER (ORDER BY seq) - octet_length(data) AS bytes_before FROM ("
        "SELECT * FROM events WHERE run_id = %(run)s AND seq > %(above)s AND seq <= %(last)s"
        # A number in the text, so that the planner knows how few rows are wanted.
        " ORDER BY seq LIMIT 1000) e) e WHERE bytes_before < %(bytes)s ORDER BY seq",
        run=run_id, above=above, last=last, bytes=BLOCK_BYTES,
    )  # fmt: skip
    return [
        Item(row["seq"], row["at_ms"], row["shown"], row["kind"], row["stamp"], row["data"]) for row in rows
    ]


async def talked(database: Database, run_id: UUID, last: int) -> bool:
    """Whether a person and an agent have talked in the entries up to a number that are in the table."""
    row = await database.fetch_one(
        "SELECT 1 FROM events WHERE run_id = %(run)s AND seq <= %(last)s AND shown & 1 <> 0 AND kind IN "
        + TALK
        + " LIMIT 1",
        run=run_id,
        last=last,
    )
    return row is not None


async def swap(
    connection: Connection, run_id: UUID, old: Archived | None, new: Archived, after_s: float, count: int
) -> bool:
    """Take `count` entries out of the table: they are in the new archive. False when the run has moved on.

    Whoever holds the run locks its row, so it cannot be started in the meantime.
    """
    await connection.execute("SELECT 1 FROM runs WHERE id = %(run)s FOR NO KEY UPDATE", {"run": run_id})
    now = await begin(connection, run_id, after_s)
    if now is None or _key(now["archived"]) != (old.key if old else None):
        return False
    await connection.execute(
        "INSERT INTO archived_events"
        " (run_id, key, last_seq, last_ms, log_entries, talked, block_seqs, block_ends) VALUES (%(run)s, %(key)s,"
        " %(last_seq)s, %(last_ms)s, %(log_entries)s, %(talked)s, %(block_seqs)s, %(block_ends)s)"
        " ON CONFLICT (run_id) DO UPDATE SET key = excluded.key, last_seq = excluded.last_seq,"
        " last_ms = excluded.last_ms, log_entries = excluded.log_entries, talked = excluded.talked,"
        " block_seqs = excluded.block_seqs, block_ends = excluded.block_ends",
        {"run": run_id, **msgspec.structs.asdict(new)},
    )
    deleted = await connection.execute(
        "DELETE FROM events WHERE run_id = %(run)s AND seq <= %(last)s", {"run": run_id, "last": new.last_seq}
    )
    if deleted.rowcount != count:
        raise MismatchError(f"archived {count} entries, but the table had {deleted.rowcount}")
    await connection.execute(
        "UPDATE stored_objects SET keep_until = 'infinity' WHERE key = %(key)s", {"key": new.key}
    )
    if old is not None:
        await _let_go(connection, [old.key])
    return True


async def remove_old(connection: Connection, keep_s: float) -> int:
    """Forget archived records that were not written to for so long, and have no younger run beside them; how many.

    At most PAGE. Whoever starts a run locks its row, so none is removed that begins again. Like artifacts, a record is
    kept while any run of its task goes on or was changed in that time: it may be resumed, and then shows the logs of
    those before it.
    """
    rows = await (
        await connection.execute(
            "WITH old AS (SELECT a.run_id, a.key FROM archived_events a JOIN runs r ON r.id = a.run_id"
            " JOIN run_cursors c ON c.run_id = a.run_id"
            " WHERE a.last_ms < (extract(epoch FROM clock_timestamp()) - %(after)s) * 1000 AND "
            + QUIET
            + " AND NOT EXISTS (SELECT 1 FROM runs o WHERE o.task_id = r.task_id AND (o.status NOT IN "
            + ENDED
            + " OR o.updated_at > clock_timestamp() - make_interval(secs => %(after)s)))"
            " ORDER BY a.last_ms LIMIT %(page)s FOR UPDATE OF a, r SKIP LOCKED),"
            " rest AS (DELETE FROM events e USING old WHERE e.run_id = old.run_id),"
            " gone AS (DELETE FROM archived_events a USING old WHERE a.run_id = old.run_id)"
            " SELECT key FROM old",
            {"after": keep_s, "page": PAGE},
        )
    ).fetchall()
    await _let_go(connection, [row["key"] for row in rows])
    return len(rows)


async def _let_go(connection: Connection, keys: Sequence[str]) -> None:
    await connection.execute(
        "UPDATE stored_objects SET keep_until = clock_timestamp() + " + SPARE + " WHERE key = ANY(%(keys)s)",
        {"keys": list(keys)},
    )


def _key(archived: object) -> object:
    return archived["key"] if isinstance(archived, dict) else None
