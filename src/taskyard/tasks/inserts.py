"""Writes new tasks, several with one statement when they come faster than the disk confirms."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import psycopg

from taskyard.db.engine import Database, Row
from taskyard.tasks import store

MOST = 64
"""Tasks of one statement."""

Waiting = list[tuple[bytes, asyncio.Future[Row]]]


class Inserts:
    """New tasks of one project wait for each other, as the project's row is locked until their commit is on the disk.

    What comes meanwhile in this process is therefore collected, and goes into the next statement together. A task
    that comes alone is written at once.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[int, Waiting] = {}
        self._writers: set[asyncio.Task[None]] = set()

    async def insert(self, project_id: int, user_id: int, fields: Mapping[str, Any]) -> Row:
        """A new task with its creator, committed; or, inside a `one_transaction`, part of it."""
        item = store.new_task(user_id, fields)
        if self._database.is_shared():
            async with self._database.connection() as connection:
                return (await store.insert(connection, project_id, [item]))[0]
        future: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        if waiting := self._waiting.get(project_id):
            waiting.append((item, future))
        else:
            self._waiting[project_id] = [(item, future)]
            if waiting is None:
                writer = asyncio.create_task(self._write(project_id), name="new tasks")
                self._writers.add(writer)
                writer.add_done_callback(self._writers.discard)
        return await future

    async def _write(self, project_id: int) -> None:
        while waiting := self._waiting[project_id]:
            now, self._waiting[project_id] = waiting[:MOST], waiting[MOST:]
            await self._write_some(project_id, now)
        del self._waiting[project_id]

    async def _write_some(self, project_id: int, waiting: Waiting) -> None:
        try:
            async with self._database.connection() as connection:
                rows = await store.insert(connection, project_id, [item for item, _ in waiting])
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if len(waiting) == 1:
                _fail(waiting, error)
                return
            for one in waiting:  # only the one that is to blame fails
                await self._write_some(project_id, [one])
        except Exception as error:  # whatever it is, it is the answer to those who wait
            _fail(waiting, error)
        else:
            for (_, future), row in zip(waiting, rows, strict=True):
                if not future.done():
                    future.set_result(row)


def _fail(waiting: Waiting, error: Exception) -> None:
    for _, future in waiting:
        if not future.done():
            future.set_exception(error)
