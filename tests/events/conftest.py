"""Parts of the events room over the test's database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from taskyard.db.engine import Database
from taskyard.db.hub import Hub
from taskyard.events.record import Record
from taskyard.events.tail import Tails
from taskyard.objects.interface import ObjectStore
from taskyard.objects.service import open_store
from taskyard.settings import Settings


@pytest.fixture
async def hub(database: Database) -> AsyncIterator[Hub]:
    hub = Hub(database.url)
    await hub.start()
    yield hub
    await hub.stop()


@pytest.fixture
async def objects(settings: Settings, database: Database) -> ObjectStore:
    return await open_store(settings, database)


@pytest.fixture
def record(database: Database, objects: ObjectStore) -> Record:
    return Record(database, objects)


@pytest.fixture
def tails(record: Record, hub: Hub) -> Tails:
    return Tails(record, hub)
