"""Fixtures of the whole suite: a fresh database, and a server on a free port."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskyard.db.engine import Database
from taskyard.settings import Settings
from tests.support.yard import Yard, open_yard

pytest_plugins = ["tests.support.postgres", "tests.support.s3", "tests.support.docker"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting and no key of the person who runs the tests reaches them."""
    for name in os.environ:
        if (name.startswith("TASKYARD_") and not name.startswith("TASKYARD_TEST_")) or name.endswith(
            "_API_KEY"
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return make_settings(tmp_path, database_url)


def make_settings(data_dir: Path, database_url: str, **areas: object) -> Settings:
    return Settings(_env_file=None, data_dir=data_dir, database_url=database_url, **areas)  # type: ignore[arg-type]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url, max_connections=6)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def yard(settings: Settings, database: Database) -> AsyncIterator[Yard]:
    """The API without a worker: runs stay queued."""
    async with open_yard(settings, database) as yard:
        yield yard
