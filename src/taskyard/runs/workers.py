"""SQL of the workers that take runs from the queue: what they can do, and when they were last seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, LiteralString

from taskyard.db.engine import Database

DEFAULT_POOL = "default"
"""The pool of runs whose environment asks for none."""
SEEN_S = 20.0
"""A worker that was not seen for this long counts as gone; it says where it is every few seconds."""
FORGET_S = 3600.0
"""Workers that died are listed for this long."""

LIVE: LiteralString = " NOT w.stopping AND w.seen_at > clock_timestamp() - make_interval(secs => 20) "
"""Condition on a worker `w` that takes runs at this moment: SEEN_S."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker says of itself."""

    name: str
    """Of this process alone: runs are held under it."""
    pools: list[str]
    capacity: int
    """Runs that it drives at once. It says 0 while its disk is full: it takes nothing then."""
    sandboxes: list[str]
    """Kinds of sandboxes that it makes."""
    agents: list[str]
    """Those that are installed on it."""
    version: str = version("taskyard")


async def beat(database: Database, worker: Worker, *, stopping: bool = False) -> None:
    """Say that a worker is there; forget those that have been gone for long."""
    await database.execute(
        """
        WITH gone AS (
            DELETE FROM workers WHERE seen_at < clock_timestamp() - make_interval(secs => %(forget)s)
                AND name <> %(name)s
        )
        INSERT INTO workers (name, pools, sandboxes, agents, capacity, version, stopping)
        VALUES (%(name)s, %(pools)s, %(sandboxes)s, %(agents)s, %(capacity)s, %(version)s, %(stopping)s)
        ON CONFLICT (name) DO UPDATE SET seen_at = clock_timestamp(), stopping = excluded.stopping,
            agents = excluded.agents, capacity = excluded.capacity
        """,
        **asdict(worker),
        stopping=stopping,
        forget=FORGET_S,
    )


async def leave(database: Database, name: str) -> None:
    """Take a worker that has ended off the list."""
    await database.execute("DELETE FROM workers WHERE name = %(name)s", name=name)


async def listed(database: Database) -> list[dict[str, Any]]:
    """All workers that were seen in the last hour, as `taskyard admin workers` shows them."""
    rows = await database.fetch(
        "SELECT w.*," + LIVE + "AS live, (SELECT count(*) FROM run_cursors c WHERE c.leased_until IS NOT NULL"
        " AND coalesce(c.reserved_by, c.worker) = w.name) AS running,"
        " extract(epoch FROM clock_timestamp() - w.seen_at)::float AS seen_s_ago FROM workers w ORDER BY w.name"
    )
    return [
        {
            "name": row["name"],
            "status": "stopping" if row["stopping"] else "live" if row["live"] else "lost",
            "pools": row["pools"],
            "capacity": row["capacity"],
            "running": row["running"],
            "agents": row["agents"],
            "sandboxes": row["sandboxes"],
            "version": row["version"],
            "started_at": row["started_at"].isoformat(),
            "seen_at": row["seen_at"].isoformat(),
            "seen_s_ago": round(row["seen_s_ago"], 1),
        }
        for row in rows
    ]
