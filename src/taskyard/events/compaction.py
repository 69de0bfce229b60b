"""Archiving: some time after a run has ended, its record moves into one object; and old records are removed.

First the object is stored, then one transaction makes it the archive and takes its entries out of the table. So every
entry can be read at any moment, and what a crash interrupts is done again; the object it left goes after a day, with
all that nothing needs. A run that ends once more gets a new object: the bytes of the old one, then new blocks.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from uuid import UUID

import msgspec
import procrastinate
import structlog

from taskyard.db.engine import AWAY, Database
from taskyard.events import archive, archive_store
from taskyard.events.archive import Archived, ArchiveLostError
from taskyard.events.archive_store import MismatchError
from taskyard.events.entries import Shown
from taskyard.jobs import QUEUE
from taskyard.objects.interface import ObjectStore, StorageError
from taskyard.settings import LogSettings

log = structlog.get_logger()

WHEN = "5,15,25,35,45,55 * * * *"
FOLDER = "logs"
CONTENT_TYPE = "application/gzip"
AWAY_AFTER = 3


def register(app: procrastinate.App, database: Database, objects: ObjectStore, settings: LogSettings) -> None:
    """Add the job that does this to a worker."""

    @app.periodic(cron=WHEN)
    @app.task(name="archive", queue=QUEUE, queueing_lock="archive")
    async def archive_job(timestamp: int) -> None:
        """Archive what is due, remove what is old. What fails now is done by the next one."""
        try:
            await sweep(database, objects, settings.archive_after_s)
            if settings.keep_days is not None:
                await remove(database, settings.keep_days * 86_400)
        except (StorageError, OSError, *AWAY) as error:
            log.warning("cannot archive logs, trying again later", error=str(error).strip())


async def sweep(database: Database, objects: ObjectStore, after_s: float) -> int:
    """Archive the records of all runs that ended and were quiet for so many seconds; how many those were.

    Several may do this at once. A run that cannot be archived does not hold up the others, unless several in a
    row cannot: then the storage is away. Raises StorageError, OSError.
    """
    done, above = 0, UUID(int=0)
    in_a_row, failed = 0, None
    while True:
        rows = await archive_store.stored(database, above, after_s)
        for row in rows:
            if row["due"]:
                try:
                    done += await move(database, objects, row["run_id"], after_s)
                    in_a_row = 0
                except (ArchiveLostError, MismatchError):
                    log.exception("cannot archive the log of a run", run=str(row["run_id"]))
                except (StorageError, OSError) as error:  # a record may be too large for the temporary folder
                    log.warning("cannot archive the log of a run", run=str(row["run_id"]), error=str(error))
                    in_a_row, failed = in_a_row + 1, error
                    if in_a_row == AWAY_AFTER:
                        raise
        if len(rows) < archive_store.PAGE:
            break
        above = rows[-1]["run_id"]
    if done:
        log.info("archived logs", count=done)
    if failed is not None:
        raise failed
    return done


async def remove(database: Database, keep_s: float) -> int:
    """Forget the records of runs that nothing was heard of for so many seconds; how many."""
    removed = 0
    while True:
        async with database.transaction() as connection:
            found = await archive_store.remove_old(connection, keep_s)
        removed += found
        if found < archive_store.PAGE:
            break
    if removed:
        log.info("removed old logs", count=removed)
    return removed


async def move(database: Database, objects: ObjectStore, run_id: UUID, after_s: float) -> bool:
    """Archive the record of one run; False when it is not due any more."""
    async with database.transaction() as connection:
        row = await archive_store.begin(connection, run_id, after_s)
        if row is None:
            return False
        old = None if row["archived"] is None else msgspec.convert(row["archived"], Archived)
        key = f"{FOLDER}/{run_id}/{row['last_seq']}-{secrets.token_hex(8)}"
        await archive_store.expect(connection, row["task_id"], key)
    with tempfile.TemporaryFile() as file:  # without a name: nothing is left of it, however this process ends
        writing = _Writing(file, key, old)
        if old is not None:
            await writing.copy(objects)
        while block := await archive_store.block(database, run_id, writing.last_seq, row["last_seq"]):
            await asyncio.to_thread(writing.add, block)
        if writing.count == 0:  # another worker was faster
            return False
        await asyncio.to_thread(file.flush)
        await objects.put_file(key, Path(f"/proc/self/fd/{file.fileno()}"), CONTENT_TYPE)
    stored = await objects.head(key)
    if stored is None or stored.size != writing.size:
        raise StorageError("The object storage does not have the log that it was just given.")
    writing.talked |= await archive_store.talked(database, run_id, writing.last_seq)
    async with database.transaction() as connection:
        return await archive_store.swap(connection, run_id, old, writing.archived(), after_s, writing.count)


@dataclass
class _Writing:
    """The object as it grows, and what the database will know of it."""

    file: IO[bytes]
    key: str
    old: Archived | None
    size: int = 0
    count: int = 0
    """Entries that come from the table."""
    last_seq: int = 0
    last_ms: int = 0
    log_entries: int = 0
    talked: bool = False
    seqs: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    async def copy(self, objects: ObjectStore) -> None:
        """Begin with the blocks of the old object."""
        assert self.old is not None
        content = await objects.open(self.old.key)
        if content is None:
            raise ArchiveLostError
        async with aclosing(content.chunks) as chunks:
            async for chunk in chunks:
                await asyncio.to_thread(self.file.write, chunk)
                self.size += len(chunk)
        if self.size != self.old.block_ends[-1]:
            raise ArchiveLostError("The archived log of this run is cut short in the object storage.")
        self.last_seq, self.log_entries, self.talked = (
            self.old.last_seq,
            self.old.log_entries,
            self.old.talked,
        )
        self.seqs, self.ends = list(self.old.block_seqs), list(self.old.block_ends)

    def add(self, block: list[archive.Item]) -> None:
        data = archive.pack(block)
        self.file.write(data)
        self.size += len(data)
        self.count += len(block)
        self.last_seq, self.last_ms = block[-1].seq, block[-1].at_ms
        self.log_entries += sum(1 for item in block if item.shown & Shown.LOG.value)
        self.seqs.append(self.last_seq)
        self.ends.append(self.size)

    def archived(self) -> Archived:
        return Archived(
            key=self.key,
            last_seq=self.last_seq,
            last_ms=self.last_ms,
            log_entries=self.log_entries,
            talked=self.talked,
            block_seqs=self.seqs,
            block_ends=self.ends,
        )
