"""Rules of tasks: what is filled in, what is refused."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from taskyard import json_schema
from taskyard.accounts.caller import Caller
from taskyard.db.engine import Connection, Database, Row
from taskyard.errors import InvalidInputError, NotFoundError
from taskyard.tasks import filters, store
from taskyard.tasks.inserts import Inserts
from taskyard.tasks.naming import title_from
from taskyard.tasks.schemas import Narrowing, OriginProduct, TaskQuery, TaskWrite
from taskyard.tasks.search import search

EVERYTHING = Narrowing()


async def create(target: Inserts | Connection, caller: Caller, body: TaskWrite) -> Row:
    """A new task of the caller's project, as stored (tasks-api §4.2); with a connection, in its transaction."""
    await check(body)
    fields = {name: getattr(body, name) for name in store.COLUMNS}
    if body.title:
        fields["title_manually_set"] = body.title_manually_set if _sent(body, "title_manually_set") else True
    else:
        fields["title"] = title_from(body.description)
    if isinstance(target, Inserts):
        return await target.insert(caller.project.id, caller.user_id, fields)
    return (await store.insert(target, caller.project.id, [store.new_task(caller.user_id, fields)]))[0]


async def update(
    connection: Connection, caller: Caller, task_id: UUID, body: TaskWrite, query: Narrowing = EVERYTHING
) -> Row:
    """Only the sent fields change (§4.4); a sent title counts as set by hand (§2.3). The body has passed `check`."""
    changes: dict[str, Any] = body.sent()
    if "title" in changes and "title_manually_set" not in changes:
        changes["title_manually_set"] = True
    if not await store.update(connection, filters.narrowed(caller, query), task_id, changes):
        raise NotFoundError
    # The change may have moved it out of what the query, or even the caller, finds.
    row = await store.get(connection, filters.of_project(caller.project.id), task_id)
    assert row is not None
    return row


async def find(
    source: Database | Connection, caller: Caller, task_id: UUID, query: Narrowing = EVERYTHING
) -> Row:
    """The task, or NotFoundError when the caller sees none with this id that fits the query."""
    row = await store.get(source, filters.narrowed(caller, query), task_id)
    if row is None:
        raise NotFoundError
    return row


async def delete(
    connection: Connection, caller: Caller, task_id: UUID, query: Narrowing = EVERYTHING
) -> None:
    """The task is gone for every endpoint; its runs stay (§4.5)."""
    if not await store.soft_delete(connection, filters.narrowed(caller, query), task_id):
        raise NotFoundError


async def page(
    connection: Connection, caller: Caller, query: TaskQuery, limit: int, offset: int, *, count_limit: int
) -> tuple[list[Row], int]:
    """One page of the list and how many tasks the whole list has (§4.1). For `count_limit` see `search`."""
    where = filters.listed(caller, query)
    if query.search:
        return await search(connection, where, query.search, limit, offset, count_limit=count_limit)
    return await store.page(connection, where, limit, offset)


async def summaries(
    database: Database, caller: Caller, ids: list[UUID], limit: int, offset: int
) -> tuple[list[Row], int]:
    """One page of the visible ones among these tasks, in short, and their count (§4.7)."""
    return await store.summaries(database, filters.readable(caller), ids, limit, offset)


async def repositories(database: Database, caller: Caller) -> list[str]:
    """The names of the repositories of visible, non-internal tasks (§4.6)."""
    return await store.repositories(database, filters.readable(caller))


def _sent(body: TaskWrite, name: str) -> bool:
    return name in body.model_fields_set


async def check(body: TaskWrite) -> None:
    """Checks beyond single fields (§2.7). No integration exists here yet, so every id is unknown.

    A schema that is none is refused when it is written, not when an answer is checked against it (§2.5). That can take
    seconds, so nothing should be locked meanwhile.
    """
    for name in ("github_integration", "github_user_integration", "signal_report"):
        if (value := getattr(body, name)) is not None:
            detail = f'Invalid pk "{value}" - object does not exist.'
            raise InvalidInputError(detail, code="does_not_exist", attr=name)
    if body.json_schema is not None and (problem := await json_schema.schema_problem(body.json_schema)):
        detail = f"json_schema is not a valid JSON Schema: {problem}"
        raise InvalidInputError(detail, attr="json_schema")
    if body.signal_report_task_relationship is None:
        return
    name = "signal_report_task_relationship"
    if body.signal_report is None:
        raise InvalidInputError("Requires signal_report when set.", attr=name)
    if body.origin_product != OriginProduct.SIGNAL_REPORT:
        raise InvalidInputError("Requires origin_product signal_report when set.", attr=name)
