"""The only place where a run changes: status, output, state, branch, each with its event.

Everybody calls `change`: the API for a client's PATCH, the driver for its own steps. The run is locked,
changed, saved, and the `task_run_state` event written in the same transaction (tasks-api §3.2, §5.4).
There is no guard between statuses for clients; the driver never revives a run that a client ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from taskyard.db.engine import Connection, Row
from taskyard.errors import NotFoundError
from taskyard.events import entries
from taskyard.events import store as events
from taskyard.runs import store
from taskyard.runs.schemas import TERMINAL
from taskyard.runs.store import Lease
from taskyard.tasks import present

KEEP: Any = object()
"""Leave a field as it is."""


async def change(
    connection: Connection,
    run_id: UUID,
    *,
    status: str = KEEP,
    stage: str | None = KEEP,
    branch: str | None = KEEP,
    error_message: str | None = KEEP,
    output: Any = KEEP,
    merge_output: Mapping[str, Any] = {},
    state: Mapping[str, Any] = {},
    remove_state: Iterable[str] = (),
    lease: Lease | None = None,
) -> Row:
    """Change a run inside the caller's transaction; the run as saved.

    `output` replaces, `merge_output` and `state` merge at the top level, `remove_state` comes before the
    merge. With a lease, LeaseLostError unless it still holds; and once the run has ended, its status and
    error stay as the client set them.
    """
    row = await store.lock(connection, run_id)
    if row is None:
        raise NotFoundError
    was = row["status"]
    new = dict(row)
    ended_by_client = lease is not None and was in TERMINAL
    if status is not KEEP and not ended_by_client:
        new["status"] = status
    if error_message is not KEEP and not ended_by_client:
        new["error_message"] = error_message
    for name, value in (("stage", stage), ("branch", branch), ("output", output)):
        if value is not KEEP:
            new[name] = value
    if merge_output:
        old = new["output"]
        new["output"] = {**(old if isinstance(old, dict) else {}), **merge_output}
    removed = set(remove_state)
    new["state"] = {key: value for key, value in new["state"].items() if key not in removed} | dict(state)
    saved = await store.save(connection, new)
    event = entries.raw(present.state_event(saved), entries.Shown.STREAM)
    await events.append(connection, run_id, [event], generation=lease.generation if lease else None)
    if saved["status"] != was and lease is None:
        await store.notify(connection, run_id)
    return saved


async def created(connection: Connection, row: Row) -> None:
    """The first event of a new run."""
    event = entries.raw(present.state_event(row), entries.Shown.STREAM)
    await events.append(connection, row["id"], [event])
