"""What a worker says of itself while it waits for runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskyard import dispatch
from taskyard.agents.adapters import adapters
from taskyard.db.engine import Database
from taskyard.runs import workers
from taskyard.settings import Settings, WorkerSettings
from taskyard.worker import running_worker
from tests.support.yard import eventually


async def test_agents_that_are_installed_or_removed_later_count(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "SWEEP_S", 0.05)

    async def agents() -> list[str]:
        return [name for worker in await workers.listed(database) for name in worker["agents"]]

    async with running_worker(settings, database):
        await eventually(agents, lambda found: found == ["scripted"], lambda found: f"worker alone, {found}")
        program = Path(adapters(settings)["codex"].command[-1])
        program.parent.mkdir(parents=True)
        program.touch()
        await eventually(agents, lambda found: "codex" in found, lambda found: f"codex in {found}")
        program.unlink()
        await eventually(agents, lambda found: found == ["scripted"], lambda found: f"end of codex: {found}")


async def test_one_with_a_full_disk_says_that_it_has_no_room(settings: Settings, database: Database) -> None:
    full = settings.model_copy(update={"worker": WorkerSettings(min_free_mb=10**9)})

    async def capacities() -> list[int]:
        return [worker["capacity"] for worker in await workers.listed(database)]

    async with running_worker(full, database):
        await eventually(
            capacities, lambda found: found == [0], lambda found: f"worker without room, {found}"
        )
