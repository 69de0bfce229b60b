"""The live stream: server-sent events read from the record (run-lifecycle §7.2).

A reader sleeps until a notification says that its run has news, then reads rows above its last number.
A slow reader costs nothing but its own time: nothing is queued for it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from uuid import UUID

from taskyard.db.engine import Database
from taskyard.db.hub import EVENTS, Hub
from taskyard.events import store
from taskyard.events.entries import Shown

KEEPALIVE_S = 20.0
KEEPALIVE = b'event: keepalive\ndata: {"type":"keepalive"}\n\n'
BATCH = 500


def position(event_id: str | None) -> int | None:
    """The number in a `Last-Event-ID`; None when there is none or it is not one of ours."""
    match = re.fullmatch(r"\s*\d{1,16}-(\d{1,18})\s*", event_id or "", re.ASCII)
    return int(match[1]) if match else None


async def _look(database: Database, run_id: UUID, after: int) -> tuple[bool, list[store.Stored]]:
    over = await store.is_over(database, run_id)
    return over, await store.read(database, run_id, Shown.STREAM, after=after, limit=BATCH)


async def frames(
    database: Database, hub: Hub, run_id: UUID, *, after: int, keepalive_s: float = KEEPALIVE_S
) -> AsyncIterator[bytes]:
    """Frames of a run's stream after the number `after`, until the run is over.

    An entry is `id:` and `data:`; silence is broken by keepalives, which carry no id, so that a client
    never resumes from one. The end is the end of the connection, without a last frame.
    """
    with hub.subscribe(f"{EVENTS}{run_id}") as wake:
        while True:
            # The state is read before the entries: nothing may slip in between. A reader that leaves cancels
            # this; without the shield its database connection would be broken off with it.
            over, batch = await asyncio.shield(_look(database, run_id, after))
            if batch:
                after = batch[-1].seq
                yield "".join(f"id: {item.id}\ndata: {item.data}\n\n" for item in batch).encode()
            elif over:
                return
            elif not await wake.wait(keepalive_s):
                yield KEEPALIVE
