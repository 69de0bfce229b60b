"""The checkpoint of a run: what a new sandbox, on any worker, needs to go on where the old one was.

It has two parts, each an object in object storage: the workspace (a git bundle of all branches and of the
uncommitted files; without a repository an archive) and the agent's session files. A part is written anew only
when it has changed. With them goes what the workspace was made from, what the run had pushed by then, and which sandbox
was made whole for it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import structlog

from taskyard.agents.adapters import Adapter
from taskyard.artifacts import store as artifacts
from taskyard.db.engine import AWAY, Database
from taskyard.drive import snapshot
from taskyard.drive.snapshot import SnapshotError, Taken
from taskyard.drive.work import Work
from taskyard.drive.workspace import Workspace
from taskyard.errors import TaskyardError
from taskyard.events.store import LeaseLostError
from taskyard.objects.interface import ObjectStore, StorageError
from taskyard.runs import resume
from taskyard.runs.resume import Checkpoint
from taskyard.runs.store import Lease
from taskyard.sandbox.provider import LostError, Sandbox, SandboxError

log = structlog.get_logger()
Json = dict[str, Any]

FOLDER = "checkpoints"
WHOLE = "sandbox"
"""The part that names the sandbox where everything is, for a worker that finds it."""


class Keeper:
    """Keeps the state of one run. `newest` is its checkpoint so far."""

    def __init__(
        self, database: Database, objects: ObjectStore, lease: Lease, task_id: UUID, newest: Checkpoint | None
    ) -> None:
        self._database = database
        self._objects = objects
        self._lease = lease
        self._task_id = task_id
        self._lock = asyncio.Lock()
        self.newest = newest
        self.hopeless = False
        """The newest try failed because of what is in the sandbox: another one will, too."""

    async def save(
        self, sandbox: Sandbox, work: Work, adapter: Adapter, session_id: str | None, *, progress: bool
    ) -> bool:
        """Make a checkpoint, if anything has changed; False when that failed, which is only logged.

        `progress`: the run got on since it was last driven anew. Raises LeaseLostError.
        """
        async with self._lock:
            try:
                await self._save(sandbox, work, adapter, session_id, progress=progress)
            except LeaseLostError:
                raise
            except (SnapshotError, StorageError, SandboxError, OSError, *AWAY) as error:
                self.hopeless = isinstance(error, (SnapshotError, LostError))
                reason = error.detail if isinstance(error, TaskyardError) else str(error)
                log.warning("no checkpoint of a run", run=str(self._lease.run_id), reason=reason)
                return False
        return True

    async def note(
        self, agent: str, session_id: str | None, workspace: Workspace | None, place: str, sandbox: Sandbox
    ) -> None:
        """Remember what the workspace was made from, which session is open, and that this sandbox is whole."""
        parts = dict(self.newest.parts) if self.newest else {}
        parts[WHOLE] = {"place": place, "id": sandbox.id}
        if workspace is not None:
            parts["base"] = {
                "path": workspace.path,
                "branch": workspace.base_branch,
                "commit": workspace.base_commit,
            }
        await self._write(Checkpoint(agent, session_id, parts), [], progress=False)

    def is_whole(self, place: str, sandbox_id: str) -> bool:
        """Whether a sandbox of this data folder had everything, and no other one was begun since."""
        return self.newest is not None and self.newest.parts.get(WHOLE) == {"place": place, "id": sandbox_id}

    async def begin_anew(self) -> None:
        """Another sandbox is begun: until it is whole, none is. Raises LeaseLostError."""
        if self.newest is not None and WHOLE in self.newest.parts:
            parts = {name: part for name, part in self.newest.parts.items() if name != WHOLE}
            await self._write(
                Checkpoint(self.newest.agent, self.newest.session_id, parts), [], progress=False
            )

    async def _save(
        self, sandbox: Sandbox, work: Work, adapter: Adapter, session_id: str | None, *, progress: bool
    ) -> None:
        parts = dict(self.newest.parts) if self.newest else {}
        new: list[str] = []
        # Before the workspace is looked at: what is pushed meanwhile may not be in it.
        pushed = {"commit": work.newest_push}
        changed = parts.get("pushed", {"commit": None}) != pushed
        parts["pushed"] = pushed
        if work.workspace is not None:
            async with snapshot.taken_workspace(sandbox, work.workspace, _hash(parts, "workspace")) as found:
                if found is not None:
                    taken, head = found
                    parts["workspace"] = {**await self._store(taken, new), "head": head}
        else:
            async with snapshot.taken_files(
                sandbox, sandbox.workspace, ["."], _hash(parts, "files"), snapshot.MAX_WORKSPACE
            ) as files:
                if files is not None:
                    parts["files"] = await self._store(files, new)
        if adapter.state_dir and adapter.session_paths:
            async with snapshot.taken_files(
                sandbox,
                state_folder(sandbox, adapter),
                adapter.session_paths,
                _hash(parts, "session"),
                snapshot.MAX_SESSION,
            ) as session:
                if session is not None:
                    parts["session"] = await self._store(session, new)
        if new or changed or progress or self.newest is None or session_id != self.newest.session_id:
            await self._write(Checkpoint(adapter.name, session_id, parts), new, progress=progress)

    async def _store(self, taken: Taken, new: list[str]) -> Json:
        key = f"{FOLDER}/{self._lease.run_id}/{self._lease.generation}-{secrets.token_hex(8)}"
        async with self._database.transaction() as connection:
            await artifacts.expect(connection, self._task_id, [key])
        await self._objects.put_file(key, taken.path, "application/octet-stream")
        new.append(key)
        return {"key": key, "hash": taken.hash}

    async def _write(self, checkpoint: Checkpoint, new: list[str], *, progress: bool) -> None:
        old = set(self.newest.keys if self.newest else []) - set(checkpoint.keys)
        async with self._database.transaction() as connection:
            await resume.save_checkpoint(connection, self._lease, checkpoint, progress=progress)
            await artifacts.hold_attached(connection, checkpoint.keys)
            await artifacts.let_go(connection, sorted(old))
        self.newest = checkpoint

    async def bring_workspace(self, sandbox: Sandbox, work: Work, kept: Checkpoint) -> None:
        """Bring a fresh workspace to a checkpoint. Raises SnapshotError, StorageError."""
        if (part := kept.parts.get("workspace")) and work.workspace is not None and work.mirror is not None:
            async with aclosing(self._content(part)) as content:
                await snapshot.bring_workspace(
                    sandbox, work.workspace, part["hash"], part["head"], content, work.mirror
                )
        elif (part := kept.parts.get("files")) and work.workspace is None:
            async with aclosing(self._content(part)) as content:
                await snapshot.bring_files(sandbox, sandbox.workspace, content)

    async def bring_session(self, sandbox: Sandbox, adapter: Adapter, kept: Checkpoint) -> bool:
        """Bring the agent's session files to a new sandbox; False when there are none for this agent."""
        part = kept.parts.get("session")
        if part is None or kept.agent != adapter.name or adapter.state_dir is None:
            return False
        async with aclosing(self._content(part)) as content:
            await snapshot.bring_files(sandbox, state_folder(sandbox, adapter), content)
        return True

    async def _content(self, part: Json) -> AsyncGenerator[bytes, None]:
        content = await self._objects.open(part["key"])
        if content is None:
            raise SnapshotError("The checkpoint of the run is not in the object storage any more.")
        async with aclosing(content.chunks) as chunks:
            async for chunk in chunks:
                yield chunk


def state_folder(sandbox: Sandbox, adapter: Adapter) -> str:
    """Where the agent keeps its state, inside the sandbox."""
    return f"{sandbox.home}/{adapter.state_dir}"


def base_of(kept: Checkpoint | None) -> Workspace | None:
    """The workspace that a checkpoint was made of."""
    base = kept.parts.get("base") if kept else None
    return None if base is None else Workspace(base["path"], base["branch"], base["commit"])


def pushed_before(kept: Checkpoint | None) -> str | None:
    """The commit that the run had pushed last when a checkpoint was made."""
    return kept.parts.get("pushed", {}).get("commit") if kept else None


def _hash(parts: Json, name: str) -> str:
    return str(parts[name]["hash"]) if name in parts else ""
