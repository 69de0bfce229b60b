"""What is kept beside a run for its next driver."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from psycopg.types.json import Jsonb

from taskyard.db.engine import Database
from taskyard.events.store import LeaseLostError
from taskyard.runs import resume, store
from tests.support.rows import make_run


async def test_pushes_are_remembered_under_the_lease(database: Database) -> None:
    claimed = await store.claim(database, await make_run(database), "test")
    assert claimed is not None
    lease = claimed.lease
    for number in range(resume.KEPT_PUSHES + 5):
        await resume.add_pushed(database, lease, f"{number:040x}")
    [row] = await database.fetch("SELECT pushed FROM run_cursors WHERE run_id = %(run)s", run=lease.run_id)
    kept = [f"{number:040x}" for number in range(5, resume.KEPT_PUSHES + 5)]
    assert row["pushed"] == kept, "the newest ones"
    with pytest.raises(LeaseLostError):
        await resume.add_pushed(database, replace(lease, generation=lease.generation - 1), "f" * 40)
    [row] = await database.fetch("SELECT pushed FROM run_cursors WHERE run_id = %(run)s", run=lease.run_id)
    assert row["pushed"] == kept


@pytest.mark.parametrize("turn_open", [True, False])
async def test_signs_of_life_keep_a_sleeping_run_until_its_wall_clock(
    database: Database, turn_open: bool
) -> None:
    run = await make_run(database)
    await database.execute("UPDATE runs SET started_at = clock_timestamp() WHERE id = %(run)s", run=run)
    await database.execute(
        "UPDATE run_cursors SET suspended_at = clock_timestamp(), due_at = clock_timestamp() - interval '1 s',"
        " driven_since = clock_timestamp() - interval '1 h', heartbeat_at = clock_timestamp(), turn = %(turn)s",
        turn=Jsonb(asdict(resume.Turn(1, "text", open=turn_open))),
    )
    assert await resume.due(database, 600, 7200) == []
    assert await resume.due(database, 600, 1800) == [run]
