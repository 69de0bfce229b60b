"""The newest frames of the runs that somebody follows: read once in each process, encoded once, for all readers.

Readers wait at a *place*, the number of the last entry they have. Whatever may have changed, a notification or the
first reader at a place, makes one read of the record; all who wait there get its frames. While nothing happens nothing
is read, however many wait and however long: a run that is suspended costs its readers only their keepalives.

What was read is kept for readers that are not waiting at the moment, since they are still sending, up to TAIL_BYTES
for a run, and forgotten as soon as all have it. Who comes later than that reads the record by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

import structlog

from taskyard.db.engine import AWAY
from taskyard.db.hub import EVENTS, Hub
from taskyard.events.record import Record
from taskyard.objects.interface import StorageError

TAIL_BYTES = 256 * 1024
KEPT_BYTES = 32 * 1024 * 1024
"""The same for all runs of a process."""
CLEAN_UP_S = 5.0
"""A run that has ended is looked at again after this time: its worker may have died, and tells nobody."""
LONGEST_DELAY_S = 5.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames that follow a place, up to the number `last`. With `over`, nothing comes behind them."""

    last: int
    frames: bytes
    over: bool


def _end(after: int) -> Batch:
    return Batch(after, b"", over=True)


Waiter = asyncio.Future["Batch | None"]


class Tails:
    """The tails of all runs that are followed in this process."""

    def __init__(self, record: Record, hub: Hub) -> None:
        self._record = record
        self._hub = hub
        self._tails: dict[UUID, Tail] = {}
        self.kept_bytes = 0
        self.ended = False
        """This process stops: readers are told that nothing comes, and go on at another one."""

    def end(self) -> None:
        """End what all readers follow, now and from now on."""
        self.ended = True
        for tail in list(self._tails.values()):
            tail.end()

    @contextmanager
    def follow(self, run_id: UUID) -> Iterator[Reader]:
        """A new reader of the run."""
        tail = self._tails.get(run_id)
        if tail is None:
            tail = self._tails[run_id] = Tail(self, self._record, run_id)
            self._hub.call(tail.topic, tail.stir)
        tail.readers += 1
        reader = Reader(tail)
        try:
            yield reader
        finally:
            reader.close()
            tail.readers -= 1
            if tail.readers == 0:
                del self._tails[run_id]
                self._hub.forget(tail.topic, tail.stir)
                tail.close()


class Reader:
    """One who follows a run. Its clock goes on from entry to entry: to set one for each wait costs too much."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._waiter: Waiter | None = None
        self._give_up_at = 0.0
        self._clock: asyncio.TimerHandle | None = None

    async def next(self, after: int, patience_s: float) -> Batch | None:
        """What follows the number `after`; None when that was nothing for so many seconds."""
        at_once = self._tail.at_once(after)
        if at_once is not None:
            return at_once
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        self._give_up_at = loop.time() + patience_s
        if self._clock is None:
            self._clock = loop.call_at(self._give_up_at, self._look_at_clock)
        return await self._tail.wait(after, self._waiter)

    def close(self) -> None:
        if self._clock is not None:
            self._clock.cancel()

    def _look_at_clock(self) -> None:
        self._clock = None
        if self._waiter is None or self._waiter.done():
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._give_up_at:
            self._clock = loop.call_at(self._give_up_at, self._look_at_clock)
        else:
            self._waiter.set_result(None)


class Tail:
    """One run's."""

    def __init__(self, tails: Tails, record: Record, run_id: UUID) -> None:
        self.record = record
        self.run_id = run_id
        self.topic = f"{EVENTS}{run_id}"
        self.readers = 0
        self._tails = tails
        self._waiting = 0
        self._places: dict[int, Place] = {}
        self._kept: dict[int, Batch] = {}
        """By the number that they follow, oldest first."""
        self._kept_bytes = 0

    def at_once(self, after: int) -> Batch | None:
        """What follows the number `after`, if it is at hand."""
        return _end(after) if self._tails.ended else self._kept.get(after)

    async def wait(self, after: int, waiter: Waiter) -> Batch | None:
        """What follows the number `after`, or what somebody else sets as the waiter's result."""
        place = self._places.get(after)
        if place is None:
            place = self._places[after] = Place(self, after)
            place.look()
        place.waiters.add(waiter)
        self._waiting += 1
        if self._waiting == self.readers:
            self._forget(0)
        try:
            return await waiter
        except asyncio.CancelledError:
            if place.waiters == {waiter}:
                self.leave(place)
            raise
        finally:
            place.waiters.discard(waiter)
            self._waiting -= 1

    def stir(self) -> None:
        """Something may have changed."""
        for place in list(self._places.values()):
            if place.waiters:
                place.look()
            else:  # its readers are sending a keepalive; who comes back and finds no place looks by itself
                self.leave(place)

    def arrived(self, place: Place, batch: Batch) -> None:
        """Give a batch to those who wait, and keep it for the others."""
        self.leave(place)
        given = place.give(batch)
        if given < self.readers and not batch.over and place.number not in self._kept:
            self._kept[place.number] = batch
            self._count(len(batch.frames))
            self._forget(TAIL_BYTES)
            if self._tails.kept_bytes > KEPT_BYTES:
                self._forget(0)

    def end(self) -> None:
        for place in list(self._places.values()):
            place.give(_end(place.number))

    def leave(self, place: Place) -> None:
        place.close()
        if self._places.get(place.number) is place:
            del self._places[place.number]

    def close(self) -> None:
        for place in list(self._places.values()):
            self.leave(place)
        self._forget(0)

    def _forget(self, down_to: int) -> None:
        while self._kept_bytes > down_to:
            self._count(-len(self._kept.pop(next(iter(self._kept))).frames))

    def _count(self, more: int) -> None:
        self._kept_bytes += more
        self._tails.kept_bytes += more


class Place:
    """Where readers of a run wait who have everything up to one number."""

    def __init__(self, tail: Tail, number: int) -> None:
        self.number = number
        self.waiters: set[Waiter] = set()
        self._tail = tail
        self._read_to = number
        self._stale = False
        self._closed = False
        self._reading: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """Read, once more if a read is going on: it may have been too early."""
        self._stale = True
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name=f"read {self._tail.run_id}")

    def give(self, batch: Batch) -> int:
        """Wake all who wait here; how many."""
        waiters = [waiter for waiter in self.waiters if not waiter.done()]
        for waiter in waiters:
            waiter.set_result(batch)
        return len(waiters)

    def close(self) -> None:
        """Nobody waits here any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    async def _read(self) -> None:
        try:
            await self._patiently()
        except Exception as error:
            log.exception("reading a run for its streams failed", run=str(self._tail.run_id))
            self._tail.leave(self)
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_exception(error)
        finally:
            self._reading = None

    async def _patiently(self) -> None:
        """Read until there is something, or nothing new; while the database is away, the readers wait."""
        delay = 0.1
        while self._stale and not self._closed:
            self._stale = False
            try:
                found = await self._tail.record.next(self._tail.run_id, self._read_to)
            except (StorageError, *AWAY) as error:
                log.warning("cannot read a run for its streams", error=str(error).strip(), delay=delay)
                await asyncio.sleep(delay)
                delay, self._stale = min(delay * 2, LONGEST_DELAY_S), True
                continue
            if found.items or found.over:
                frames = "".join([f"id: {item.id}\ndata: {item.data}\n\n" for item in found.items]).encode()
                self._tail.arrived(self, Batch(found.last, frames, found.over))
                return
            self._read_to = found.last
            if found.ending and not self._closed:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = asyncio.get_running_loop().call_later(CLEAN_UP_S, self.look)
