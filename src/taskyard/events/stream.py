"""The live stream: server-sent events read from the record (run-lifecycle §7.2).

A reader sleeps until somebody has read what follows its last number, and gets the same bytes as all others that
wait there. A slow reader costs nothing but its own time: nothing is queued for it.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID

from taskyard.db.engine import AWAY
from taskyard.events.tail import Tails

KEEPALIVE_S = 20.0
RECHECK_S = 60.0
"""What is sent later than this after a look at the reader's permission is sent only after another one."""
KEEPALIVE = b'event: keepalive\ndata: {"type":"keepalive"}\n\n'


def position(event_id: str | None) -> int | None:
    """The number in a `Last-Event-ID`; None when there is none or it is not one of ours."""
    match = re.fullmatch(r"\s*\d{1,16}-(\d{1,18})\s*", event_id or "", re.ASCII)
    return int(match[1]) if match else None


async def always() -> bool:
    return True


async def frames(
    tails: Tails,
    run_id: UUID,
    *,
    after: int,
    keepalive_s: float = KEEPALIVE_S,
    allowed: Callable[[], Awaitable[bool]] = always,
) -> AsyncIterator[bytes]:
    """Frames of a run's stream after the number `after`, until the run is over or the reader is not `allowed` it.

    An entry is `id:` and `data:`; silence is broken by keepalives, which carry no id, so that a client
    never resumes from one. The end is the end of the connection, without a last frame.
    """
    checked = time.monotonic()  # by the guard of the request
    with tails.follow(run_id) as reader:
        while True:
            batch = await reader.next(after, keepalive_s)
            if batch is None:
                yield KEEPALIVE
                continue
            after = batch.last
            if batch.frames and time.monotonic() - checked > RECHECK_S:
                try:
                    if not await allowed():
                        return
                    checked = time.monotonic()
                except AWAY:
                    pass  # a database that is away for a moment ends no stream: the next frames ask again
            if batch.frames:
                yield batch.frames
            if batch.over:
                return
