"""SQL of artifacts: staged ones, those of runs, and how long their objects are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, LiteralString
from uuid import UUID

from psycopg.types.json import Jsonb

from taskyard.accounts.caller import Caller
from taskyard.db.engine import Connection, Database, Row
from taskyard.tasks import filters

Json = dict[str, Any]

OF_TASK: LiteralString = "r.id = %(run)s AND r.task_id = %(task)s AND r.project_id = %(project)s"
VISIBLE: LiteralString = " AND EXISTS (SELECT FROM tasks t WHERE t.id = r.task_id" + filters.OWN + ")"


def readable(caller: Caller, task_id: UUID, run_id: UUID) -> tuple[LiteralString, dict[str, Any]]:
    """The one place that scopes a run `r`: to a task, deleted or not, of the caller's project that they may see."""
    scope = {"project": caller.project.id, "task": task_id, "run": run_id, "viewer": caller.user_id}
    return (OF_TASK if caller.sees_all else OF_TASK + VISIBLE), scope


STAGED: LiteralString = "interval '24 hours'"
"""How long a finalized upload waits for its run (tasks-api §8)."""
UNATTACHED: LiteralString = "interval '1 day'"
"""How long an object is kept that belongs to no run."""
ATTACHED: LiteralString = "interval '30 days'"


# --- staged artifacts --------------------------------------------------------------------------------


async def stage(connection: Connection, task_id: UUID, entries: Sequence[Json]) -> None:
    """Keep entries for the run that will take them; the time of those that are kept already begins anew."""
    await connection.execute(
        "INSERT INTO staged_artifacts (task_id, id, entry, expires_at)"
        " SELECT %(task)s, e ->> 'id', e, clock_timestamp() + " + STAGED + ""
        # One row for each id, in the order in which everybody locks them.
        " FROM (SELECT DISTINCT ON (e ->> 'id') e FROM unnest(%(entries)s::jsonb[]) WITH ORDINALITY AS u (e, n)"
        " ORDER BY e ->> 'id', n DESC) newest"
        " ON CONFLICT (task_id, id) DO UPDATE SET entry = excluded.entry, expires_at = excluded.expires_at",
        {"task": task_id, "entries": [Jsonb(entry) for entry in entries]},
    )


async def unstage(connection: Connection, task_id: UUID, ids: Sequence[str]) -> dict[str, Json]:
    """Take staged entries out, by id: whoever comes second finds them gone. Expired ones are not found."""
    rows = await (
        await connection.execute(
            "WITH wanted AS (SELECT task_id, id FROM staged_artifacts"
            " WHERE task_id = %(task)s AND id = ANY(%(ids)s) AND expires_at > clock_timestamp()"
            " ORDER BY id FOR UPDATE)"
            " DELETE FROM staged_artifacts s USING wanted w WHERE s.task_id = w.task_id AND s.id = w.id"
            " RETURNING s.id, s.entry",
            {"task": task_id, "ids": list(ids)},
        )
    ).fetchall()
    return {row["id"]: row["entry"] for row in rows}


async def forget_expired(connection: Connection) -> None:
    await connection.execute("DELETE FROM staged_artifacts WHERE expires_at <= clock_timestamp()")


# --- the manifests of runs ---------------------------------------------------------------------------


async def run(database: Database, caller: Caller, task_id: UUID, run_id: UUID) -> Row | None:
    """A run's `artifacts`; None when the caller sees no such run of that task."""
    where, scope = readable(caller, task_id, run_id)
    return await database.fetch_one("SELECT r.artifacts FROM runs r WHERE " + where, **scope)


async def lock_run(connection: Connection, caller: Caller, task_id: UUID, run_id: UUID) -> Row | None:
    """The same, locked until the transaction ends. Events of the run are not kept waiting."""
    where, scope = readable(caller, task_id, run_id)
    query: LiteralString = "SELECT r.artifacts FROM runs r WHERE " + where + " FOR NO KEY UPDATE OF r"
    return await (await connection.execute(query, scope)).fetchone()


async def add(connection: Connection, run_id: UUID, entries: Sequence[Json]) -> list[Json]:
    """Add entries to the end of a locked run's manifest; the whole of it. `updated_at` grows strictly."""
    row = await (
        await connection.execute(
            "UPDATE runs SET artifacts = artifacts || %(entries)s,"
            " updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')"
            " WHERE id = %(run)s RETURNING artifacts",
            {"run": run_id, "entries": Jsonb(list(entries))},
        )
    ).fetchone()
    assert row is not None
    return list(row["artifacts"])


CHAIN_START: LiteralString = (
    "WITH RECURSIVE chain AS ("
    " SELECT r.id, r.task_id, r.state, r.artifacts, 0 AS hops, ARRAY[r.id] AS seen FROM runs r WHERE "
)
CHAIN_REST: LiteralString = (
    " UNION ALL"
    " SELECT earlier.id, earlier.task_id, earlier.state, earlier.artifacts, chain.hops + 1, chain.seen || earlier.id"
    " FROM chain JOIN runs earlier ON earlier.task_id = chain.task_id"
    # Compared as text: a client may have put anything there.
    " AND earlier.id::text = lower(chain.state ->> 'resume_from_run_id')"
    " WHERE chain.hops < 10 AND earlier.id <> ALL (chain.seen))"
    " SELECT e AS entry FROM chain, jsonb_array_elements(chain.artifacts) AS e"
    " WHERE e ->> 'storage_path' = %(path)s ORDER BY hops LIMIT 1"
)


async def entry_in_chain(
    database: Database, caller: Caller, task_id: UUID, run_id: UUID, path: str
) -> Json | None:
    """The entry with this path of a run, or of those it resumes: same task, at most 10 hops, each run once."""
    where, scope = readable(caller, task_id, run_id)
    row = await database.fetch_one(CHAIN_START + where + CHAIN_REST, **scope, path=path)
    return None if row is None else dict(row["entry"])


# --- how long objects are kept -----------------------------------------------------------------------


async def expect(connection: Connection, task_id: UUID, keys: Sequence[str]) -> None:
    """Objects may come under these new keys. Unless something else is said of one, it goes after a day."""
    await connection.execute(
        "INSERT INTO stored_objects (key, task_id, keep_until)"
        " SELECT unnest(%(keys)s::text[]), %(task)s, clock_timestamp() + " + UNATTACHED,
        {"task": task_id, "keys": list(keys)},
    )


HOLD: LiteralString = (
    "WITH wanted AS (SELECT key FROM stored_objects WHERE key = ANY(%(keys)s) ORDER BY key FOR UPDATE)"
    " UPDATE stored_objects o SET keep_until = greatest(o.keep_until, clock_timestamp() + "
)


async def hold(connection: Connection, keys: Sequence[str]) -> set[str]:
    """Keep objects for at least another day; the keys of those that have not gone yet."""
    return await _hold(connection, HOLD + UNATTACHED, keys)


async def hold_attached(connection: Connection, keys: Sequence[str]) -> set[str]:
    """The same for objects of a run, for 30 days."""
    return await _hold(connection, HOLD + ATTACHED, keys)


async def let_go(connection: Connection, keys: Sequence[str]) -> None:
    """Nothing needs these objects any more."""
    await connection.execute(
        "UPDATE stored_objects SET keep_until = clock_timestamp() WHERE key = ANY(%(keys)s)",
        {"keys": list(keys)},
    )


async def _hold(connection: Connection, query: LiteralString, keys: Sequence[str]) -> set[str]:
    rows = await (
        await connection.execute(
            query + ") FROM wanted w WHERE o.key = w.key RETURNING o.key", {"keys": list(keys)}
        )
    ).fetchall()
    return {row["key"] for row in rows}


DUE: LiteralString = (
    "SELECT o.key, ("
    " EXISTS (SELECT 1 FROM staged_artifacts s WHERE s.task_id = o.task_id"
    "   AND s.expires_at > clock_timestamp() AND s.entry ->> 'storage_path' = o.key)"
    " OR (EXISTS (SELECT 1 FROM runs r WHERE r.task_id = o.task_id"
    "   AND r.artifacts @> jsonb_build_array(jsonb_build_object('storage_path', o.key)))"
    " OR EXISTS (SELECT 1 FROM runs r JOIN checkpoints c ON c.run_id = r.id, jsonb_each(c.parts) part"
    "   WHERE r.task_id = o.task_id AND part.value ->> 'key' = o.key))"
    " AND EXISTS (SELECT 1 FROM runs r WHERE r.task_id = o.task_id"
    "   AND (r.status NOT IN ('completed', 'failed', 'cancelled')"
    "     OR r.updated_at > clock_timestamp() - " + ATTACHED + "))"
    ") AS needed"
    " FROM stored_objects o WHERE o.keep_until <= clock_timestamp()"
    " ORDER BY o.keep_until LIMIT %(limit)s FOR UPDATE OF o SKIP LOCKED"
)


async def due(connection: Connection, limit: int) -> list[Row]:
    """Objects whose time is over (`key`), locked, and whether something still needs them (`needed`).

    Needed is what waits to be attached, and what a run has (artifacts, its checkpoint) while any run of its task is
    not over, or was changed in the last 30 days: it may be resumed, and then reads what those before it left.
    """
    return await (await connection.execute(DUE, {"limit": limit})).fetchall()


async def forget(connection: Connection, keys: Sequence[str]) -> None:
    """Objects that are not there any more."""
    await connection.execute("DELETE FROM stored_objects WHERE key = ANY(%(keys)s)", {"keys": list(keys)})
