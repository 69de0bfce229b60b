"""LISTEN/NOTIFY: one connection of a process hears of changes and wakes whoever waits for them.

A notification is only a hint to look at the rows. Waiters must look after subscribing and again after
each wake; when the listening connection was lost, everybody is woken, so nothing is missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import LiteralString

import psycopg
import structlog

CHANNEL = "taskyard"
EVENTS = "e:"
"""Prefix of a payload: new events of the run that follows."""
RUNS = "r:"
"""Prefix of a payload: a command or a new status of the run that follows."""

QUEUE: LiteralString = "q"
"""A payload: a run came into the queue, or there is room for one that waits."""

CHECK_S = 30.0
"""A connection that was silent for this long is asked whether it still lives: a dead one looks just as silent."""

log = structlog.get_logger()


class Wake:
    """Level-triggered signal: `wait()` returns at once if anything happened since the last call."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, timeout: float | None = None) -> bool:
        """True when woken, False after `timeout` seconds."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout)
        except TimeoutError:
            return False
        self._event.clear()
        return True


class Hub:
    """The process's ear. Start it once; subscribe with a prefix and an id."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._calls: dict[str, set[Callable[[], None]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._listen(), name="hub")
        await self._ready.wait()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    @contextmanager
    def subscribe(self, *topics: str) -> Iterator[Wake]:
        """A wake for these topics, e.g. `hub.subscribe(f"{EVENTS}{run_id}")`."""
        wake = Wake()
        for topic in topics:
            self.call(topic, wake.set)
        try:
            yield wake
        finally:
            for topic in topics:
                self.forget(topic, wake.set)

    def call(self, topic: str, callback: Callable[[], None]) -> None:
        """Have something called, in the event loop, at each hint for a topic, until `forget`."""
        self._calls.setdefault(topic, set()).add(callback)

    def forget(self, topic: str, callback: Callable[[], None]) -> None:
        calls = self._calls[topic]
        calls.discard(callback)
        if not calls:
            del self._calls[topic]

    async def _listen(self) -> None:
        delay = 0.1
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    self._url, autocommit=True, connect_timeout=10
                ) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    self._wake_all()
                    self._ready.set()
                    delay = 0.1
                    while True:
                        async for notice in connection.notifies(timeout=CHECK_S):
                            for call in list(self._calls.get(notice.payload, ())):
                                call()
                        async with asyncio.timeout(CHECK_S):
                            await connection.execute("SELECT 1")
            except (psycopg.Error, OSError) as error:
                log.warning(
                    "lost the notification connection, connecting again", error=str(error), delay=delay
                )
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    def _wake_all(self) -> None:
        for calls in list(self._calls.values()):
            for call in list(calls):
                call()
