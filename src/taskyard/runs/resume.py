"""SQL of what lets a run be driven again: the turn it is in, its newest checkpoint, and its sleep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.types.json import Jsonb

from taskyard.db.engine import Connection, Database, Row, fetch_one
from taskyard.events.store import LeaseLostError
from taskyard.runs.store import Lease

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """The newest turn of a run, as the next worker has to know it."""

    number: int
    """1 for the first turn of the run since it was started."""
    text: str
    """The message that the agent was given."""
    artifacts: Sequence[Json] = ()
    open: bool = True
    """The agent has not ended it yet."""
    permissions: Sequence[Json] = ()
    """Requests of the agent that a person has not answered, for an open turn."""
    stop_reason: str = ""
    failure: Sequence[str] = ()
    """`error_type` and message of what the run is to fail of now."""
    saved: bool = False
    """A checkpoint was made after its end."""
    result: Sequence[Any] = ()
    """The structured result that the agent gave: one value, or none."""

    @property
    def output(self) -> Json:
        """What of the run has to be changed for a turn that is cut short: its result is kept."""
        return {"output": self.result[0]} if self.open and self.result else {}

    @classmethod
    def of(cls, value: Json | None) -> Turn | None:
        if value is None:
            return None
        return cls(**{name: value[name] for name in cls.__slots__ if name in value})


async def _held(source: Database | Connection, lease: Lease, query: LiteralString, **params: Any) -> Row:
    """The row of a statement that finds none when %(generation)s is not the run's. Raises LeaseLostError then."""
    row = await fetch_one(source, query, run=lease.run_id, generation=lease.generation, **params)
    if row is None:
        raise LeaseLostError
    return row


async def turn_of(connection: Connection, lease: Lease) -> Turn | None:
    """The newest turn, locked until the transaction ends. Raises LeaseLostError."""
    row = await _held(
        connection,
        lease,
        "SELECT turn FROM run_cursors WHERE run_id = %(run)s AND generation = %(generation)s FOR NO KEY UPDATE",
    )
    return Turn.of(row["turn"])


async def set_turn(connection: Connection, lease: Lease, turn: Turn) -> None:
    """Remember the turn; the end of one is progress. Raises LeaseLostError."""
    await _held(
        connection,
        lease,
        "UPDATE run_cursors SET turn = %(turn)s || CASE WHEN %(open)s THEN '{}'::jsonb"
        " ELSE jsonb_build_object('ended_at', CASE WHEN turn ->> 'open' = 'false' THEN turn -> 'ended_at'"
        " ELSE to_jsonb(clock_timestamp()) END) END,"
        " resumes = CASE WHEN %(open)s THEN resumes ELSE 0 END"
        " WHERE run_id = %(run)s AND generation = %(generation)s RETURNING 1",
        turn=Jsonb(asdict(turn)),
        open=turn.open,
    )


async def count_resume(database: Database, lease: Lease) -> int:
    """Count a loss that the worker itself outlived; how many there were in a row. Raises LeaseLostError."""
    row = await _held(
        database,
        lease,
        "UPDATE run_cursors SET resumes = resumes + 1"
        " WHERE run_id = %(run)s AND generation = %(generation)s RETURNING resumes",
    )
    return int(row["resumes"])


KEPT_PUSHES = 50


async def add_pushed(database: Database, lease: Lease, commit: str) -> None:
    """Remember a commit before it is pushed to the run's branch. Raises LeaseLostError: it must not be pushed then."""
    await _held(
        database,
        lease,
        "UPDATE run_cursors SET pushed = (pushed || %(commit)s::text)[greatest(1, cardinality(pushed) + 2 - %(kept)s):]"
        " WHERE run_id = %(run)s AND generation = %(generation)s RETURNING 1",
        commit=commit,
        kept=KEPT_PUSHES,
    )


async def is_completing(connection: Connection, lease: Lease) -> bool:
    """Whether an output has come that completes the run. Raises LeaseLostError."""
    row = await _held(
        connection,
        lease,
        "SELECT completing FROM run_cursors WHERE run_id = %(run)s AND generation = %(generation)s",
    )
    return bool(row["completing"])


# --- checkpoints -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is kept of a run's sandbox. The parts are as drive/checkpoint.py wrote them."""

    agent: str
    session_id: str | None
    parts: Json

    @property
    def keys(self) -> list[str]:
        """Keys of its objects."""
        return [part["key"] for part in self.parts.values() if part.get("key")]


async def save_checkpoint(
    connection: Connection, lease: Lease, checkpoint: Checkpoint, *, progress: bool
) -> None:
    """Replace the run's checkpoint. Raises LeaseLostError."""
    await _held(
        connection,
        lease,
        "WITH held AS (UPDATE run_cursors SET resumes = CASE WHEN %(progress)s THEN 0 ELSE resumes END"
        "   WHERE run_id = %(run)s AND generation = %(generation)s RETURNING run_id)"
        " INSERT INTO checkpoints (run_id, generation, parts, session_id, agent)"
        " SELECT run_id, %(generation)s, %(parts)s, %(session)s, %(agent)s FROM held"
        " ON CONFLICT (run_id) DO UPDATE SET generation = excluded.generation, at = clock_timestamp(),"
        " parts = excluded.parts, session_id = excluded.session_id, agent = excluded.agent RETURNING 1",
        parts=Jsonb(checkpoint.parts),
        session=checkpoint.session_id,
        agent=checkpoint.agent,
        progress=progress,
    )


async def checkpoint_of(database: Database, run_id: UUID) -> Checkpoint | None:
    """The newest checkpoint of a run."""
    row = await database.fetch_one(
        "SELECT agent, session_id, parts FROM checkpoints WHERE run_id = %(run)s", run=run_id
    )
    return None if row is None else Checkpoint(row["agent"], row["session_id"], row["parts"])


async def forget_checkpoint(connection: Connection, run_id: UUID) -> None:
    """The run goes on elsewhere: what was kept of it here is not its state any more."""
    await connection.execute("DELETE FROM checkpoints WHERE run_id = %(run)s", {"run": run_id})


# --- sleep -------------------------------------------------------------------------------------------


async def suspend(connection: Connection, lease: Lease, due_s: float) -> None:
    """From now on nothing drives the run, until a command comes or `due_s` seconds are over; its sandbox goes.

    Raises LeaseLostError.
    """
    await _held(
        connection,
        lease,
        "UPDATE run_cursors SET suspended_at = clock_timestamp(), place = NULL,"
        " due_at = clock_timestamp() + make_interval(secs => %(due)s)"
        " WHERE run_id = %(run)s AND generation = %(generation)s RETURNING 1",
        due=due_s,
    )


async def wake(connection: Connection, run_id: UUID, *, message: bool) -> bool:
    """End the sleep of a locked run; True when it was asleep: the caller has it driven.

    A message does not wake a run in the middle of a turn: it could not be delivered before the end of that.
    """
    row = await (
        await connection.execute(
            "UPDATE run_cursors SET suspended_at = NULL, due_at = NULL"
            " WHERE run_id = %(run)s AND suspended_at IS NOT NULL"
            " AND NOT (%(message)s AND (turn ->> 'open')::boolean IS TRUE) RETURNING 1",
            {"run": run_id, "message": message},
        )
    ).fetchone()
    return row is not None


async def due(database: Database, inactivity_s: float, wall_clock_s: float) -> list[UUID]:
    """Sleeping runs whose time is over. A sign of life from outside moves it (run-lifecycle §1.1), but not beyond
    the wall clock."""
    rows = await database.fetch(
        "SELECT c.run_id FROM run_cursors c JOIN runs r ON r.id = c.run_id"
        " WHERE c.suspended_at IS NOT NULL AND c.due_at < clock_timestamp() AND r.started_at IS NOT NULL"
        " AND (c.heartbeat_at IS NULL OR c.heartbeat_at + make_interval(secs => %(inactivity)s) < clock_timestamp()"
        " OR c.driven_since + make_interval(secs => %(wall_clock)s) < clock_timestamp())"
        " LIMIT 1000",
        inactivity=inactivity_s,
        wall_clock=wall_clock_s,
    )
    return [row["run_id"] for row in rows]


async def asleep(connection: Connection, run_id: UUID) -> Turn | None:
    """The turn of a locked run that is due, if it sleeps still."""
    row = await (
        await connection.execute(
            "SELECT turn FROM run_cursors WHERE run_id = %(run)s AND due_at < clock_timestamp()",
            {"run": run_id},
        )
    ).fetchone()
    return None if row is None else Turn.of(row["turn"])
