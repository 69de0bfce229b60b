"""Upload of a run's events by its agent: numbered lines, accepted exactly once (tasks-api §6.8).

Events go to the stream, not to the log. What was accepted stays accepted when a later line of the same
request is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from taskyard.db.engine import Database
from taskyard.events import entries, store
from taskyard.events.entries import Entry, Shown

LINE_BYTES = 1_000_000
REQUEST_BYTES = 5_000_000
REQUEST_EVENTS = 1000
COMPLETE = "_posthog/stream_complete"


class RefusedError(Exception):
    """A line was refused; `status` is that of the HTTP answer: 400, 409 or 413."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status


@dataclass(frozen=True, slots=True)
class Line:
    """One event, or the completion (`event` is None) with its `final_seq`."""

    seq: int
    event: dict[str, Any] | None


class Upload:
    """One request: give it the chunks of the body, then finish it."""

    def __init__(self, database: Database, run_id: UUID) -> None:
        self._database = database
        self._run_id = run_id
        self._rest = b""
        self._bytes = 0
        self._events = 0
        self._completion: Line | None = None
        self.accepted = 0
        self.duplicate = 0

    async def feed(self, chunk: bytes) -> None:
        """Accept the whole lines of a chunk. Raises RefusedError for the first bad one, after those before it."""
        refused: RefusedError | None = None
        room = REQUEST_BYTES - self._bytes
        self._bytes += len(chunk)
        if len(chunk) > room:
            chunk, refused = (
                chunk[:room],
                RefusedError(413, f"The request has more than {REQUEST_BYTES} bytes"),
            )
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > LINE_BYTES:
            refused = RefusedError(413, _TOO_LONG)
        await self._take(lines, refused)

    async def finish(self) -> None:
        """The body is whole: a last line needs no line feed, and a completion counts now."""
        rest, self._rest = self._rest, b""
        await self._take([rest], None)
        if self._completion is None:
            return
        async with self._database.transaction() as connection:
            last, _ = await store.ingested(connection, self._run_id)
            if self._completion.seq != last:
                raise RefusedError(
                    409, f"final_seq is {self._completion.seq}, the last accepted event {last}"
                )
            await store.set_ingested(connection, self._run_id, last, done=True)

    async def _take(self, lines: Sequence[bytes], refused: RefusedError | None) -> None:
        events: list[Line] = []
        try:
            for text in lines:
                if text.strip():
                    self._sort(parse(text), events)
        except RefusedError as error:
            refused = error
        if events:
            await self._store(events)
        if refused is not None:
            raise refused

    def _sort(self, line: Line, events: list[Line]) -> None:
        if self._completion is not None:
            raise RefusedError(400, "Completion line must be the final event stream line")
        if line.event is None:
            self._completion = line
            return
        self._events += 1
        if self._events > REQUEST_EVENTS:
            raise RefusedError(413, f"The request has more than {REQUEST_EVENTS} events")
        events.append(line)

    async def _store(self, lines: Sequence[Line]) -> None:
        """Append what is new, in order; a gap refuses its line and all behind it."""
        refused: RefusedError | None = None
        duplicate = 0
        new: list[Entry] = []
        active = False
        async with self._database.transaction() as connection:
            last, done = await store.ingested(connection, self._run_id)
            for line in lines:
                assert line.event is not None
                if line.seq <= last:
                    duplicate += 1
                    continue
                if done or line.seq != last + 1:
                    reason = (
                        "The event stream is complete" if done else f"Expected seq {last + 1}, got {line.seq}"
                    )
                    refused = RefusedError(409, reason)
                    break
                last = line.seq
                new.append(entries.raw(line.event, Shown.STREAM))
                active |= _method(line.event) == "session/update"
            if new:
                await store.append(connection, self._run_id, new, heartbeat=active)
                await store.set_ingested(connection, self._run_id, last, done=False)
        self.accepted += len(new)
        self.duplicate += duplicate
        if refused is not None:
            raise refused


_TOO_LONG = f"A line has more than {LINE_BYTES} bytes"


def parse(text: bytes) -> Line:
    """A line of the upload. Raises RefusedError: 413 when it is too long, 400 when it is not well formed."""
    if len(text) > LINE_BYTES:
        raise RefusedError(413, _TOO_LONG)
    try:
        value = json.loads(text.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise RefusedError(400, "Line is not UTF-8") from None
    except (ValueError, RecursionError):
        raise RefusedError(400, "Line is not valid JSON") from None
    if not isinstance(value, dict):
        raise RefusedError(400, "Line must be a JSON object")
    if value.get("type") == COMPLETE:
        return Line(_number(value, "final_seq", 0), None)
    event = value.get("event")
    seq = _number(value, "seq", 1)
    if not isinstance(event, dict):
        raise RefusedError(400, "event must be an object")
    return Line(seq, event)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _number(value: dict[str, Any], name: str, least: int) -> int:
    number = value.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number < 2**63:
        raise RefusedError(400, f"{name} must be an integer of at least {least}")
    return number


def _method(event: dict[str, Any]) -> Any:
    message = event.get("notification")
    return message.get("method") if isinstance(message, dict) else None
