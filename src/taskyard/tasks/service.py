"""Rules of tasks: what is filled in, what is refused."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from taskyard.accounts.caller import Caller
from taskyard.db.engine import Connection, Row
from taskyard.errors import InvalidInputError, NotFoundError
from taskyard.tasks import store
from taskyard.tasks.naming import title_from
from taskyard.tasks.schemas import OriginProduct, TaskWrite


async def create(connection: Connection, caller: Caller, body: TaskWrite) -> Row:
    """A new task of the caller's project, as stored (tasks-api §4.2)."""
    _check(body)
    fields = {name: getattr(body, name) for name in store.COLUMNS}
    if body.title:
        fields["title_manually_set"] = body.title_manually_set if _sent(body, "title_manually_set") else True
    else:
        fields["title"] = title_from(body.description)
    task_id = await store.insert(connection, caller.project.id, caller.user_id, fields)
    return await find(connection, caller, task_id)


async def update(connection: Connection, caller: Caller, task_id: UUID, body: TaskWrite) -> Row:
    """Only the sent fields change (§4.4); a sent title counts as set by hand (§2.3)."""
    _check(body)
    changes: dict[str, Any] = body.sent()
    if "title" in changes and "title_manually_set" not in changes:
        changes["title_manually_set"] = True
    if not await store.update(connection, caller.project.id, task_id, changes):
        raise NotFoundError
    return await find(connection, caller, task_id)


async def find(connection: Connection, caller: Caller, task_id: UUID) -> Row:
    """The task, or NotFoundError."""
    row = await store.get(connection, caller.project.id, task_id)
    if row is None:
        raise NotFoundError
    return row


async def delete(connection: Connection, caller: Caller, task_id: UUID) -> None:
    if not await store.soft_delete(connection, caller.project.id, task_id):
        raise NotFoundError


def _sent(body: TaskWrite, name: str) -> bool:
    return name in body.model_fields_set


def _check(body: TaskWrite) -> None:
    """Checks between fields (§2.7). No integration exists here yet, so every id is unknown."""
    for name in ("github_integration", "github_user_integration", "signal_report"):
        if (value := getattr(body, name)) is not None:
            detail = f'Invalid pk "{value}" - object does not exist.'
            raise InvalidInputError(detail, code="does_not_exist", attr=name)
    if body.signal_report_task_relationship is None:
        return
    name = "signal_report_task_relationship"
    if body.signal_report is None:
        raise InvalidInputError("Requires signal_report when set.", attr=name)
    if body.origin_product != OriginProduct.SIGNAL_REPORT:
        raise InvalidInputError("Requires origin_product signal_report when set.", attr=name)
