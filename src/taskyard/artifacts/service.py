"""Rules of artifacts: preparing, finalizing, attaching and reading them (tasks-api §4.9, §4.10, §7).

An object's key is written down before anybody can upload it, and its row is locked by whoever decides about it, so
what the retention job removes is never what somebody has just been promised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from taskyard.accounts.caller import Caller
from taskyard.artifacts import paths, store
from taskyard.artifacts.limits import FORM_SLACK_BYTES, size_problem
from taskyard.artifacts.schemas import FinalizeItem, InlineItem, Item, PrepareItem
from taskyard.db.engine import Connection, Database, Row
from taskyard.errors import InvalidInputError, NotFoundError
from taskyard.objects.interface import (
    VALID_S,
    Content,
    ObjectStore,
    SigningError,
    StorageError,
    Stored,
    attachment,
    media_type,
)
from taskyard.tasks import service as tasks

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """What every call needs: where rows and objects are, how clients reach us, who asks about which task."""

    database: Database
    objects: ObjectStore
    folder: str
    origin: str
    caller: Caller
    task_id: UUID

    @property
    def staged(self) -> str:
        return paths.staged_prefix(self.folder, self.caller.project.id, self.task_id)

    def of_run(self, run_id: UUID) -> str:
        return paths.run_prefix(self.folder, self.caller.project.id, self.task_id, run_id)


# --- staged artifacts --------------------------------------------------------------------------------


async def prepare_staged(place: Place, items: Sequence[PrepareItem]) -> list[Json]:
    """A form for each item; it belongs to the task until a run takes it (§4.9)."""
    await tasks.find(place.database, place.caller, place.task_id)
    return await _prepare(place, items, lambda new, name: paths.staged_path(place.staged, new, name))


async def finalize_staged(place: Place, items: Sequence[FinalizeItem]) -> list[Json]:
    """Check that the uploads are there, and keep their entries for the next run; all or nothing (§4.10)."""
    await tasks.find(place.database, place.caller, place.task_id)
    found = await _look(place, items, lambda path, one: paths.is_staged_path(path, place.staged, one))
    entries = []
    for item in items:
        if not paths.is_staged_path(item.storage_path, place.staged, item.id):
            raise _refused("Artifact storage path is invalid for this task")
        entries.append(_uploaded(item, found.get(item.storage_path)))
    async with place.database.transaction() as connection:
        await store.stage(connection, place.task_id, entries)
        await _keep(store.hold, connection, entries)
    return entries


async def attach_staged(connection: Connection, task_id: UUID, run_id: UUID, ids: list[str]) -> list[Json]:
    """Take staged artifacts of a task for its new run: their entries in the order of the ids (§4.8.2 steps 7 and 9).

    They can be taken once, and are kept for 30 days from now. Raises InvalidInputError when one is not there.
    """
    entries = await store.unstage(connection, task_id, ids)
    held = await store.hold_attached(connection, [entry["storage_path"] for entry in entries.values()])
    missing = [one for one in ids if one not in entries or entries[one]["storage_path"] not in held]
    if missing:
        detail = "Some pending_user_artifact_ids are invalid or expired"
        raise InvalidInputError(body={"detail": detail, "missing_artifact_ids": missing})
    return [entries[one] for one in ids]


# --- artifacts of runs -------------------------------------------------------------------------------


def entries_of(run: Row, ids: Iterable[str]) -> tuple[list[Json], list[str]]:
    """The entries of a run's manifest with these ids, in their order, and the ids that it does not have."""
    known = {entry.get("id"): entry for entry in run["artifacts"]}
    found, missing = [], []
    for one in ids:
        if one in known:
            found.append(known[one])
        else:
            missing.append(one)
    return found, missing


async def upload(place: Place, run_id: UUID, items: Sequence[InlineItem]) -> list[Json]:
    """Store what the request itself brings; the whole manifest of the run, the new entries last (§7)."""
    await _manifest(place, run_id)
    prefix = place.of_run(run_id)
    entries = []
    for item in items:
        new, name = uuid4().hex, paths.safe_name(item.name)
        path = paths.run_path(prefix, new, name)
        entries.append(_entry(item, new, name, len(item.content), item.content_type, path))
    # Before anything is stored, also when the whole request is one transaction: else a crash leaves objects behind.
    with place.database.apart():
        async with place.database.transaction() as connection:
            await store.expect(connection, place.task_id, [entry["storage_path"] for entry in entries])
    for item, entry in zip(items, entries, strict=True):
        await place.objects.put(entry["storage_path"], item.content, media_type(item.content_type))
    async with place.database.transaction() as connection:
        await _lock(connection, place, run_id)
        await _keep(store.hold_attached, connection, entries)
        return await store.add(connection, run_id, entries)


async def prepare(place: Place, run_id: UUID, items: Sequence[PrepareItem]) -> list[Json]:
    """A form for each item (§7)."""
    await _manifest(place, run_id)
    prefix = place.of_run(run_id)
    return await _prepare(place, items, lambda new, name: paths.run_path(prefix, new, name))


async def finalize(place: Place, run_id: UUID, items: Sequence[FinalizeItem]) -> list[Json]:
    """Check that the uploads are there, and add them to the run's manifest; all or nothing (§7).

    The entries of this request. What the manifest has already, by id or by path, is given back as it is.
    """
    prefix, known = place.of_run(run_id), _Known(await _manifest(place, run_id))
    new = [item for item in items if known.find(item) is None]
    found = await _look(place, new, lambda path, one: paths.is_run_path(path, prefix, one))
    entries, added = [], []
    for item in items:
        if not paths.is_run_path(item.storage_path, prefix, item.id):
            raise _refused("Artifact storage path is invalid for this run")
        if known.find(item) is None:
            known.add(_uploaded(item, found.get(item.storage_path)))
    async with place.database.transaction() as connection:
        # Somebody else may have finalized the same ones in the meantime.
        stored = _Known(await _lock(connection, place, run_id))
        for item in items:
            entry = stored.find(item)
            if entry is None:
                entry = known.find(item)
                assert entry is not None
                stored.add(entry)
                added.append(entry)
            entries.append(entry)
        if added:
            await _keep(store.hold_attached, connection, added)
            await store.add(connection, run_id, added)
    return entries


async def presign(place: Place, run_id: UUID, path: str) -> Json:
    """A URL for an artifact of this run (§7)."""
    manifest = await _manifest(place, run_id)
    entry = next((entry for entry in manifest if entry.get("storage_path") == path), None)
    if entry is None:
        raise _not_found("Artifact not found on this run")
    try:
        url = place.objects.download_url(
            place.origin,
            path,
            disposition=attachment(paths.safe_name(str(entry["name"]))),
            content_type=media_type(entry.get("content_type")),
        )
    except SigningError as error:
        raise _refused("Unable to generate download URL") from error
    return {"url": url, "expires_in": VALID_S}


async def download(place: Place, run_id: UUID, path: str) -> tuple[Json, Content]:
    """An artifact of this run, or of one that it resumes: its entry and its bytes (§7)."""
    await _manifest(place, run_id)
    entry = await store.entry_in_chain(place.database, place.caller, place.task_id, run_id, path)
    if entry is None:
        raise _not_found("Artifact not found on this run")
    try:
        content = await place.objects.open(path)
    except StorageError as error:
        raise _refused("Unable to read artifact") from error
    if content is None:
        raise _not_found("Artifact content not found")
    return entry, content


# --- steps that they share ---------------------------------------------------------------------------


class _Known:
    """Entries by id and by path."""

    def __init__(self, entries: Iterable[Json]) -> None:
        self._by_id: dict[str, Json] = {}
        self._by_path: dict[str, Json] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Json) -> None:
        self._by_id.setdefault(str(entry.get("id")), entry)
        self._by_path.setdefault(str(entry.get("storage_path")), entry)

    def find(self, item: FinalizeItem) -> Json | None:
        return self._by_id.get(item.id) or self._by_path.get(item.storage_path)


async def _manifest(place: Place, run_id: UUID) -> list[Json]:
    row = await store.run(place.database, place.caller, place.task_id, run_id)
    if row is None:
        raise NotFoundError
    return list(row["artifacts"])


async def _lock(connection: Connection, place: Place, run_id: UUID) -> list[Json]:
    row = await store.lock_run(connection, place.caller, place.task_id, run_id)
    if row is None:
        raise NotFoundError
    return list(row["artifacts"])


async def _prepare(
    place: Place, items: Sequence[PrepareItem], path_of: Callable[[str, str], str]
) -> list[Json]:
    prepared: list[Json] = []
    for item in items:
        new, name = uuid4().hex, paths.safe_name(item.name)
        path = path_of(new, name)
        try:
            form = place.objects.upload_form(place.origin, path, item.size + FORM_SLACK_BYTES)
        except SigningError as error:
            raise _refused("Unable to generate upload URL") from error
        prepared.append(
            {
                "id": new,
                "name": name,
                "type": item.type,
                "source": item.source,
                "size": item.size,
                "content_type": item.content_type,
                "storage_path": path,
                "expires_in": VALID_S,
                "presigned_post": {"url": form.url, "fields": form.fields},
            }
        )
    async with place.database.transaction() as connection:
        await store.expect(connection, place.task_id, [entry["storage_path"] for entry in prepared])
    return prepared


async def _look(
    place: Place, items: Sequence[FinalizeItem], belongs: Callable[[str, str], bool]
) -> dict[str, Stored]:
    """What is stored under the paths of the items that may have them, held for a while so that it stays."""
    keys = sorted({item.storage_path for item in items if belongs(item.storage_path, item.id)})
    # Not locked any longer than this, since others lock the run before its objects.
    with place.database.apart():
        async with place.database.transaction() as connection:
            held = sorted(await store.hold(connection, keys)) if keys else []
    found = await asyncio.gather(*(place.objects.head(key) for key in held))
    return {key: stored for key, stored in zip(held, found, strict=True) if stored is not None}


def _uploaded(item: FinalizeItem, stored: Stored | None) -> Json:
    """The entry of an upload; InvalidInputError when it cannot be one."""
    if stored is None:
        raise _refused("Artifact upload not found in object storage")
    if stored.size is None:
        raise _refused("Artifact upload metadata is unavailable")
    content_type = item.content_type or stored.content_type
    if (problem := size_problem(item.name, item.type, content_type, stored.size)) is not None:
        raise _refused(problem)
    return _entry(item, item.id, paths.safe_name(item.name), stored.size, content_type, item.storage_path)


def _entry(item: Item, new: str, name: str, size: int, content_type: str, path: str) -> Json:
    """An Artifact as clients see it (§3)."""
    return {
        "id": new,
        "name": name,
        "type": item.type,
        "source": item.source,
        "size": size,
        "content_type": content_type,
        "storage_path": path,
        "uploaded_at": datetime.now(UTC).isoformat(timespec="microseconds"),
    }


async def _keep(hold: Callable[..., Any], connection: Connection, entries: Sequence[Json]) -> None:
    """Keep the objects of entries that are about to be promised; they were held, so they are there."""
    keys = {str(entry["storage_path"]) for entry in entries}
    if keys - await hold(connection, sorted(keys)):
        raise _refused("Artifact upload not found in object storage")


def _refused(text: str) -> InvalidInputError:
    return InvalidInputError(text, body={"error": text})


def _not_found(text: str) -> NotFoundError:
    return NotFoundError(text, body={"error": text})
