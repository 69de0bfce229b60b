"""The disk of a worker is full for a while: its runs wait, and none fails. A small file system of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from taskyard.db.engine import Database
from taskyard.settings import Settings, WorkerSettings
from taskyard.worker import running_worker
from tests.conftest import make_settings
from tests.support.disk import fill, small_disk
from tests.support.yard import Yard, eventually, open_yard

SCRIPTED = {"agent": "scripted"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "64m") as folder:
        yield folder


@pytest.fixture
def settings(disk: Path, database_url: str) -> Settings:
    return make_settings(disk / "data", database_url, worker=WorkerSettings(min_free_mb=8))


@pytest.fixture
async def yard(settings: Settings, database: Database) -> AsyncIterator[Yard]:
    settings.data_dir.mkdir()
    async with open_yard(settings, database) as yard:
        yield yard


async def test_a_run_waits_until_there_is_space(
    yard: Yard, settings: Settings, database: Database, disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running_worker(settings, database):
        ballast = fill(disk)
        run = await yard.api().start("WRITE a.txt one\nSAY done", **SCRIPTED)
        said = ""

        async def output() -> str:
            nonlocal said
            said += "".join(capfd.readouterr())
            return said

        await eventually(output, lambda text: "the disk is full: taking no runs" in text, lambda text: text)
        assert (await run.fetch())["status"] == "queued"
        ballast.unlink()
        body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
