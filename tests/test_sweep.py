"""What a worker sweeps, and whose it is: runs that go on here keep their sandboxes, everything else is removed."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from taskyard.agents import install
from taskyard.db.engine import Database
from taskyard.forge.git import remove_unfinished
from taskyard.jobs import SILENT_S, forget_lost
from taskyard.objects.service import open_store
from taskyard.runs import store as runs
from taskyard.sandbox.bubblewrap import BubblewrapProvider
from taskyard.sandbox.provider import Spec
from taskyard.settings import Settings
from taskyard.sweep import Sweeper
from tests.support.rows import make_run
from tests.support.sandboxes import LIMITS
from tests.support.yard import Yard, eventually, open_yard

HERE = "here"


async def driven(database: Database, run_id: UUID, *, place: str = HERE, asleep: bool = False) -> None:
    await database.execute("UPDATE runs SET started_at = now() WHERE id = %(run)s", run=run_id)
    await database.execute(
        "UPDATE run_cursors SET place = %(place)s, suspended_at = CASE WHEN %(asleep)s THEN now() END"
        " WHERE run_id = %(run)s",
        run=run_id,
        place=place,
        asleep=asleep,
    )


async def test_which_runs_keep_their_sandboxes(database: Database) -> None:
    on, elsewhere, asleep, over = [await make_run(database) for _ in range(4)]
    await driven(database, on)
    await driven(database, elsewhere, place="there")
    await driven(database, asleep, asleep=True)
    await driven(database, over)
    await database.execute("UPDATE runs SET started_at = NULL WHERE id = %(run)s", run=over)
    names = [str(on), str(elsewhere), str(asleep), str(over), str(uuid4()), "selftest-1", f"{on}.2", "x\0y"]
    assert await runs.driven_here(database, HERE, names) == {str(on)}
    assert await runs.driven_here(database, HERE, []) == set()


async def test_a_sweep(settings: Settings, database: Database) -> None:
    provider = BubblewrapProvider(settings)
    objects = await open_store(settings, database)
    sweeper = Sweeper(provider, database, objects, settings, HERE)
    on, over = await make_run(database), await make_run(database)
    await driven(database, on)
    for run_id in (on, over):
        sandbox = await provider.create(Spec(str(run_id), LIMITS))
        await sandbox.detach()
    (settings.data_dir / "mirrors" / "a.new").mkdir(parents=True)
    await sweeper.sweep()
    assert await provider.list() == [str(on)]
    assert not (settings.data_dir / "mirrors" / "a.new").exists()
    await database.execute("UPDATE runs SET started_at = NULL")
    await sweeper.sweep()
    assert await provider.list() == []


async def test_a_sweep_without_a_database_removes_no_sandbox(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    async def away(*_: object) -> set[str]:
        raise psycopg.OperationalError("away")

    monkeypatch.setattr(runs, "driven_here", away)
    provider = BubblewrapProvider(settings)
    sandbox = await provider.create(Spec("one", LIMITS))
    await sandbox.detach()
    (settings.data_dir / "mirrors" / "a.new").mkdir(parents=True)
    sweeper = Sweeper(provider, database, await open_store(settings, database), settings, HERE)
    await sweeper.sweep()
    assert await provider.list() == ["one"]
    # The other steps do not suffer from it.
    assert not (settings.data_dir / "mirrors" / "a.new").exists()
    monkeypatch.undo()
    await sweeper.sweep()
    assert await provider.list() == []


async def test_a_worker_sweeps_as_it_starts(settings: Settings, database: Database) -> None:
    provider = BubblewrapProvider(settings)
    sandbox = await provider.create(Spec("left", LIMITS))
    await sandbox.detach()
    async with open_yard(settings, database, worker=True) as yard:
        assert isinstance(yard, Yard)
        await eventually(provider.list, lambda names: names == [], lambda names: f"end of {names}")


async def test_a_clone_that_goes_on_is_not_touched(tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "mirrors"
    for name in ("live.new", "dead.new"):
        (folder / name).mkdir(parents=True)
    with (folder / "live.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        await remove_unfinished(tmp_path)
        assert [path.name for path in folder.glob("*.new")] == ["live.new"]
    await remove_unfinished(tmp_path)
    assert list(folder.glob("*.new")) == []


async def test_installations_that_were_killed(tmp_path: Path) -> None:
    old, young = (tmp_path / "agents" / name for name in (".claude-old", ".claude-young"))
    kept = tmp_path / "agents" / "claude-1.0.0"
    for folder in (old, young, kept):
        (folder / "new").mkdir(parents=True)
    then = time.time() - 2 * install.INSTALL_S - 60
    for folder in (old, kept):
        os.utime(folder, (then, then))
    await asyncio.to_thread(install.remove_unfinished, tmp_path)
    assert sorted(path.name for path in (tmp_path / "agents").iterdir()) == [".claude-young", "claude-1.0.0"]


async def test_jobs_of_dead_workers(database: Database) -> None:
    await database.execute(
        "INSERT INTO procrastinate_workers (id, last_heartbeat) OVERRIDING SYSTEM VALUE VALUES"
        " (1, now()), (2, now() - make_interval(secs => %(silent)s))",
        silent=SILENT_S + 60,
    )
    await database.execute(
        "INSERT INTO procrastinate_jobs (queue_name, task_name, status, worker_id) VALUES"
        " ('runs', 'live', 'doing', 1), ('runs', 'silent', 'doing', 2), ('runs', 'lost', 'doing', NULL),"
        " ('runs', 'waits', 'todo', NULL), ('runs', 'failed', 'failed', NULL)"
    )
    await forget_lost(database)
    left = await database.fetch("SELECT task_name FROM procrastinate_jobs ORDER BY task_name")
    assert [row["task_name"] for row in left] == ["live", "waits"]
