"""A whole server in this process: API, worker, sandboxes; runs are driven by the scripted agent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskyard.db.engine import Database
from taskyard.settings import RunSettings, Settings
from tests.conftest import make_settings
from tests.support.repositories import make_repository
from tests.support.yard import Yard, ok, open_yard


@pytest.fixture
def run_settings() -> RunSettings:
    return RunSettings()


@pytest.fixture
def settings(tmp_path: Path, database_url: str, run_settings: RunSettings) -> Settings:
    return make_settings(tmp_path / "data", database_url, runs=run_settings)


@pytest.fixture
async def live(settings: Settings, database: Database) -> AsyncIterator[Yard]:
    async with open_yard(settings, database, worker=True) as yard:
        yield yard


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A repository on the host with one commit on main."""
    return make_repository(tmp_path / "shop")


@pytest.fixture
async def repository(live: Yard, shop: Path) -> str:
    """The name under which tasks know `shop`."""
    return str(ok(await live.api().post("repositories/", {"origin": str(shop)}), 201)["name"])
