"""Runs that sleep longer than they may: they end without being woken."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import structlog

from taskyard.commands import store as commands
from taskyard.db.engine import Connection
from taskyard.drive.failures import INACTIVE, too_long
from taskyard.drive.held import Parts
from taskyard.runs import lifecycle, resume
from taskyard.runs import store as runs

log = structlog.get_logger()


async def end_sleepers(parts: Parts) -> None:
    """End the sleeping runs whose time is over (run-lifecycle §1.4). Several workers may do this at once."""
    limits = parts.settings.runs
    for run_id in await resume.due(parts.database, limits.inactivity_s, limits.wall_clock_s):
        async with parts.database.transaction() as connection:
            await _end(connection, run_id, limits.wall_clock_s)


async def _end(connection: Connection, run_id: UUID, wall_clock_s: float) -> None:
    row = await runs.lock(connection, run_id)
    turn = await resume.asleep(connection, run_id)
    if row is None or row["started_at"] is None or turn is None:
        return
    if await commands.any_waits(connection, run_id, turn_open=turn.open):
        return
    changes: dict[str, Any]
    if turn.open:
        changes = {
            "status": "failed",
            "error_message": too_long(wall_clock_s),
            "state": {"error_type": "deadline"},
            **turn.output,
        }
    else:
        changes = {
            "status": "completed",
            "error_message": INACTIVE,
            "state": {"timed_out_inactivity": True},
        }
    await lifecycle.change(connection, run_id, **changes)
    log.info("ended a sleeping run", run=str(run_id), status=changes["status"])
