"""SQL of the mailbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from taskyard.db.engine import Connection, Database, Row
from taskyard.events.store import LeaseLostError
from taskyard.runs.store import Lease


@dataclass(frozen=True, slots=True)
class Letter:
    """One command in the mailbox."""

    seq: int
    method: str
    params: dict[str, Any]


async def insert(
    connection: Connection, run_id: UUID, user_id: int, method: str, params: Mapping[str, Any]
) -> int:
    """Add a command behind the others, and tell the driver; its number. The run's row must be locked."""
    row = await (
        await connection.execute(
            "INSERT INTO commands (run_id, seq, method, params, created_by_id)"
            " SELECT %(run)s, coalesce(max(seq), 0) + 1, %(method)s, %(params)s, %(user)s"
            " FROM commands WHERE run_id = %(run)s RETURNING seq, pg_notify('taskyard', 'r:' || run_id::text)",
            {"run": run_id, "method": method, "params": Jsonb(params), "user": user_id},
        )
    ).fetchone()
    assert row is not None
    return int(row["seq"])


async def take(database: Database, lease: Lease, methods: tuple[str, ...], limit: int = 100) -> list[Letter]:
    """The waiting commands of these methods in order, now marked as delivered to this generation.

    One that was delivered to it and has no answer comes again: the answer to the first `take` may have been
    lost with its connection. So whoever takes a command answers it before the next `take`.
    """
    rows = await database.fetch(
        "UPDATE commands SET delivered_at = clock_timestamp(), generation = %(generation)s"
        " WHERE run_id = %(run)s AND seq IN ("
        "   SELECT seq FROM commands WHERE run_id = %(run)s AND method = ANY(%(methods)s) AND"
        "   (delivered_at IS NULL OR (generation = %(generation)s AND answered_at IS NULL))"
        "   ORDER BY seq LIMIT %(limit)s)"
        " AND EXISTS (SELECT 1 FROM run_cursors WHERE run_id = %(run)s AND generation = %(generation)s)"
        " RETURNING seq, method, params",
        run=lease.run_id,
        generation=lease.generation,
        methods=list(methods),
        limit=limit,
    )
    return [
        Letter(row["seq"], row["method"], row["params"]) for row in sorted(rows, key=lambda row: row["seq"])
    ]


async def take_message(connection: Connection, lease: Lease) -> Row | None:
    """The next message (`params`), taken and answered; None when none waits.

    One that steers comes before those that were sent earlier. The caller remembers it in the same transaction. What
    was to be cancelled for it, or by commands before it, is over: they are answered, and do not end its own turn.
    """
    return await (
        await connection.execute(
            "WITH taken AS (UPDATE commands SET delivered_at = clock_timestamp(), answered_at = clock_timestamp(),"
            " generation = %(generation)s, result = '{\"queued\": true}'"
            " WHERE run_id = %(run)s AND seq = (SELECT seq FROM commands WHERE run_id = %(run)s"
            "   AND method = 'user_message' AND delivered_at IS NULL"
            "   ORDER BY (params ->> 'steer') IS NULL, seq LIMIT 1)"
            " RETURNING seq, params"
            "), done AS (UPDATE commands SET delivered_at = clock_timestamp(), answered_at = clock_timestamp(),"
            " generation = %(generation)s, result = '{\"cancelled\": true}'"
            # A message that steers is followed by its own cancel (service.py).
            " WHERE run_id = %(run)s AND method = 'cancel' AND delivered_at IS NULL"
            " AND seq <= (SELECT seq + (params ? 'steer')::int FROM taken)"
            " RETURNING pg_notify('taskyard', 'r:' || run_id::text)"
            ") SELECT taken.params, (SELECT count(*) FROM done) FROM taken",
            {"run": lease.run_id, "generation": lease.generation},
        )
    ).fetchone()


async def any_waits(connection: Connection, run_id: UUID, *, turn_open: bool) -> bool:
    """Whether a command waits that could be delivered now: a message comes after the turn that is open.

    With the run locked, none can come in between.
    """
    rows = await connection.execute(
        "SELECT 1 FROM commands WHERE run_id = %(run)s AND delivered_at IS NULL"
        " AND NOT (%(open)s AND method = 'user_message') LIMIT 1",
        {"run": run_id, "open": turn_open},
    )
    return await rows.fetchone() is not None


async def message_waits(connection: Connection, run_id: UUID) -> bool:
    """Whether a message waits. With the run locked, none can come in between."""
    rows = await connection.execute(
        "SELECT 1 FROM commands WHERE run_id = %(run)s AND delivered_at IS NULL AND method = 'user_message' LIMIT 1",
        {"run": run_id},
    )
    return await rows.fetchone() is not None


async def answer(
    database: Database, lease: Lease, seq: int, *, result: Any = None, error: str | None = None
) -> None:
    """Record the answer of a command, and wake who waits for it."""
    row = await database.fetch_one(
        "UPDATE commands SET result = %(result)s, error = %(error)s, answered_at = clock_timestamp()"
        " WHERE run_id = %(run)s AND seq = %(seq)s AND generation = %(generation)s"
        " RETURNING pg_notify('taskyard', 'r:' || run_id::text)",
        run=lease.run_id,
        generation=lease.generation,
        seq=seq,
        result=None if result is None else Jsonb(result),
        error=error,
    )
    if row is None:
        raise LeaseLostError


async def answered(database: Database, run_id: UUID, seq: int) -> Row | None:
    """The answer of a command, once there is one."""
    return await database.fetch_one(
        "SELECT result, error FROM commands WHERE run_id = %(run)s AND seq = %(seq)s AND answered_at IS NOT NULL",
        run=run_id,
        seq=seq,
    )


async def is_driven(database: Database, run_id: UUID) -> bool:
    """Whether a worker drives the run, or will; False once it has ended or gone to a client."""
    row = await database.fetch_one(
        "SELECT started_at IS NOT NULL AS driven FROM runs WHERE id = %(run)s", run=run_id
    )
    return row is not None and bool(row["driven"])
