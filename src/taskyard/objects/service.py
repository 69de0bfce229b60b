"""Opening the configured store."""

from __future__ import annotations

import asyncio

from taskyard.db.engine import Database
from taskyard.objects.forms import FormSigner
from taskyard.objects.interface import ObjectStore
from taskyard.objects.local import LocalStore
from taskyard.settings import Settings


async def open_store(settings: Settings, database: Database) -> ObjectStore:
    """The S3 bucket that the settings name, else the folder `objects` of the data folder."""
    if settings.objects.s3.bucket is not None:
        # Late and in a thread: the library takes a moment to load, and few sites need it.
        from taskyard.objects.s3 import S3Store

        return await asyncio.to_thread(S3Store, settings.objects.s3)
    row = await database.fetch_one("SELECT key FROM signing_keys WHERE name = 'objects'")
    assert row is not None
    return LocalStore(settings.data_dir / "objects", FormSigner(bytes(row["key"])))
