"""The only place where a run changes: status, output, state, branch, each with its event.

Everybody calls `change`: the API for a client's PATCH, the driver for its own steps. The run is locked,
changed, saved, and the `task_run_state` event written in the same transaction (tasks-api §3.2, §5.4).
There is no guard between statuses for clients; the driver never revives a run that a client ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from taskyard.db.engine import Connection, Row
from taskyard.errors import NotFoundError
from taskyard.events import entries
from taskyard.events import store as events
from taskyard.jobs import enqueue_drive, update_waiting
from taskyard.runs import store
from taskyard.runs.schemas import TERMINAL
from taskyard.runs.store import Lease
from taskyard.tasks import present
from taskyard.tasks.present import as_object

KEEP: Any = object()
"""Leave a field as it is."""


PROTECTED = re.compile(
    r"github_credential_source|pr_authorship_mode|automation_id|inactivity_timeout_seconds|priority|queue"
    r"|allowed_models|(budget|sandbox|snapshot|wizard|use_modal)_.*"
)
"""Keys of `state` that clients neither set nor remove (tasks-api §5.4): the server decides by them."""


def is_protected(key: str) -> bool:
    return PROTECTED.fullmatch(key) is not None


async def change(
    connection: Connection,
    run_id: UUID,
    *,
    status: str = KEEP,
    stage: str | None = KEEP,
    branch: str | None = KEEP,
    environment: str = KEEP,
    error_message: str | None = KEEP,
    output: Any = KEEP,
    merge_output: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] = {},
    replace_state: Any = KEEP,
    remove_state: Iterable[str] = (),
    start: bool = False,
    lease: Lease | None = None,
) -> Row:
    """Change a run inside the caller's transaction; the run as saved.

    `output` and `replace_state` replace, `merge_output` and `state` merge at the top level, `remove_state` comes
    before the merge. Into an output that is no object the driver merges nothing: a client gave it.
    `start`: a worker drives the run from now on, and an earlier end is forgotten; going `local` ends that. With a
    lease, LeaseLostError unless it still holds; and once a client has ended the run or taken it over, its status
    and error stay as they are.
    """
    row = await store.lock(connection, run_id)
    if row is None:
        raise NotFoundError
    new = dict(row)
    taken_over = lease is not None and (row["status"] in TERMINAL or row["started_at"] is None)
    if status is not KEEP and not taken_over:
        new["status"] = status
    if error_message is not KEEP and not taken_over:
        new["error_message"] = error_message
    for name, value in (
        ("stage", stage),
        ("branch", branch),
        ("output", output),
        ("environment", environment),
    ):
        if value is not KEEP:
            new[name] = value
    whole = new["output"] is not None and not isinstance(new["output"], dict)
    if merge_output is not None and not (whole and lease is not None):
        new["output"] = {**as_object(new["output"]), **merge_output}
    if new["environment"] == "local":
        new["started_at"] = None
    if start:
        new["completed_at"] = None
    gone = set(remove_state)
    if new["status"] in TERMINAL:
        gone.add("suspended")  # nothing can wake it any more
    new["state"] = _state(new["state"], gone, state, replace_state)
    saved = await store.save(connection, new, start=start)
    event = entries.raw(present.state_event(saved), entries.Shown.STREAM)
    await events.append(connection, run_id, [event], generation=lease.generation if lease else None)
    if lease is None and saved["state"] != row["state"]:
        await update_waiting(connection, run_id)
    if lease is None and (saved["status"], saved["started_at"]) != (row["status"], row["started_at"]):
        await store.notify(connection, run_id)
        if saved["started_at"] is None and await store.sleeps_with_mail(connection, run_id):
            await enqueue_drive(connection, run_id)  # a worker says that they were not delivered
    return saved


def _state(old: Any, removed: set[str], merged: Mapping[str, Any], replacement: Any) -> Any:
    kept = {key: value for key, value in as_object(old).items() if key not in removed}
    if replacement is not KEEP:
        protected = {key: value for key, value in kept.items() if is_protected(key)}
        return protected or replacement
    if not isinstance(old, dict) and not merged:
        return old
    return kept | dict(merged)


async def created(connection: Connection, row: Row) -> None:
    """The first event of a new run."""
    event = entries.raw(present.state_event(row), entries.Shown.STREAM)
    await events.append(connection, row["id"], [event])
