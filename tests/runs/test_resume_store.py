"""What is kept beside a run for its next driver."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
