"""A run that this worker holds: everything that is read and written of it goes under its lease."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from taskyard.commands import store as commands
from taskyard.commands.store import Letter
from taskyard.db.engine import AWAY, Database, Row, raise_cancelled
from taskyard.db.hub import Hub, Wake
from taskyard.drive.failures import storable
from taskyard.drive.prompt import Message
from taskyard.drive.recorder import Recorder
from taskyard.events import entries
from taskyard.events import store as events
from taskyard.objects.interface import ObjectStore
from taskyard.redact import LOGS, Redactor
from taskyard.runs import lifecycle, resume
from taskyard.runs import store as runs
from taskyard.runs.resume import Turn
from taskyard.runs.schemas import PENDING_KEYS
from taskyard.runs.store import Claimed
from taskyard.sandbox.provider import Provider
from taskyard.settings import Settings, server_secrets
from taskyard.tasks.present import as_object

log = structlog.get_logger()
T = TypeVar("T")


class Drain:
    """The stop of a worker, as its drivers hear of it."""

    def __init__(self) -> None:
        self.until: float | None = None
        """Loop time until which turns may go on; None while the worker takes runs."""
        self._wakes: set[Wake] = set()

    def begin(self, patience_s: float) -> None:
        """Tell every driver that the worker stops; told again, it may be sooner but not later."""
        until = asyncio.get_running_loop().time() + patience_s
        self.until = until if self.until is None else min(self.until, until)
        for wake in self._wakes:
            wake.set()

    @contextmanager
    def heard_by(self, wake: Wake) -> Iterator[None]:
        self._wakes.add(wake)
        try:
            yield
        finally:
            self._wakes.discard(wake)


@dataclass(frozen=True)
class Parts:
    """What every driver of a worker shares."""

    settings: Settings
    database: Database
    hub: Hub
    provider: Provider
    objects: ObjectStore
    worker: str
    place: str
    """Names the worker's data folder (sandbox/place.py)."""
    drain: Drain


class HeldRun:
    def __init__(self, parts: Parts, claimed: Claimed, wake: Wake) -> None:
        self.parts = parts
        self.claimed = claimed
        self.lease = lease = claimed.lease
        self.run_id = str(lease.run_id)
        self.turn = Turn.of(claimed.turn)
        """The newest turn; None before the first."""
        self._told = True
        """An agent was told the message of that turn, as far as is known."""
        self._wake = wake
        self.secrets = Redactor(server_secrets(parts.settings))
        """What nothing that is written of the run may contain."""
        self._own_secrets: list[str] = []
        self.recorder = Recorder(
            parts.database, lease, on_lost=wake.set, secrets=self.secrets, written=claimed.last_seq
        )
        self._stands = asyncio.Event()
        """The lease is known to stand; else no agent may work."""
        self._stands.set()
        self._renewal = asyncio.create_task(self._renew(), name=f"lease {self.run_id}")
        self._row: Row = {}

    @property
    def session_id(self) -> str:
        """The agent's session; the run's own id while there is none."""
        return self.run_id

    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        held, wait = True, runs.LEASE_S / 3
        # By a clock of its own: a statement can hang for longer.
        end = loop.call_later(runs.LEASE_S, self._cut_off)
        try:
            while held:
                await asyncio.sleep(wait)
                asked = loop.time()
                try:
                    held = await runs.renew(self.parts.database, self.lease)
                except AWAY:
                    raise_cancelled()
                    wait = min(wait, 1.0)
                else:
                    wait = runs.LEASE_S / 3
                    end.cancel()
                    if held:
                        end = loop.call_at(asked + runs.LEASE_S, self._cut_off)
                        self._stands.set()
        finally:
            end.cancel()
        self.recorder.lost = True
        self._wake.set()

    def _cut_off(self) -> None:
        """The lease has run out without an answer of the database: another worker may have the run by now."""
        self._stands.clear()

    def _hide(self, secrets: Sequence[str]) -> None:
        """From now on, show these nowhere."""
        self.secrets.add(secrets)
        LOGS.add(secrets)
        self._own_secrets += secrets

    def _forget_secrets(self) -> None:
        LOGS.remove(self._own_secrets)
        self._own_secrets = []

    async def _change(self, **changes: Any) -> None:
        """Change the run under the lease, behind everything that was recorded before."""
        await self.recorder.flush()
        changes = self.secrets.value(changes)

        async def change() -> Row:
            async with self.parts.database.transaction() as connection:
                return await lifecycle.change(connection, self.lease.run_id, lease=self.lease, **changes)

        self._keep(await self._patiently(change))

    async def _end_of_work(self, **changes: Any) -> bool:
        """Complete the run, unless a message waits. Who sends one locks the run, as is done here: none is lost."""
        await self.recorder.flush()
        changes = self.secrets.value(changes)

        async def end() -> Row | None:
            async with self.parts.database.transaction() as connection:
                await runs.lock(connection, self.lease.run_id)
                if await commands.message_waits(connection, self.lease.run_id):
                    return None
                return await lifecycle.change(
                    connection, self.lease.run_id, lease=self.lease, status="completed", **changes
                )

        saved = await self._patiently(end)
        if saved is not None:
            self._keep(saved)
        return saved is not None

    async def _begin_turn(self, first: Message | None = None) -> Turn | None:
        """Take the next message, or the `first` one, and remember it as the turn that is on; None when none waits.

        One transaction takes it out of the mailbox, writes it to the record and remembers it: whatever happens to
        this worker, it is neither lost nor delivered as new twice.
        """
        await self.recorder.flush()
        number = self.turn.number + 1 if self.turn else 1

        async def begin() -> tuple[Row | None, Turn] | None:
            async with self.parts.database.transaction() as connection:
                row = await runs.lock(connection, self.lease.run_id)
                known = await resume.turn_of(connection, self.lease)
                if known is not None and known.number == number:
                    return None, known  # the answer to an earlier try was lost
                if first is not None:
                    message = first
                    assert row is not None
                    pending = [key for key in PENDING_KEYS if key in as_object(row["state"])]
                    row = (
                        await lifecycle.change(
                            connection, self.lease.run_id, lease=self.lease, remove_state=pending
                        )
                        if pending
                        else None
                    )
                elif (taken := await commands.take_message(connection, self.lease)) is not None:
                    row, params = None, taken["params"]
                    message = Message(str(params["content"]), params.get("artifacts") or ())
                else:
                    return None
                text = message.text or "See the attached files."
                update = {"sessionUpdate": "user_message_chunk", "content": {"type": "text", "text": text}}
                entry = entries.session_update(self.session_id, self.secrets.value(update))
                await events.append(connection, self.lease.run_id, [entry], generation=self.lease.generation)
                turn = Turn(number, text, [dict(artifact) for artifact in message.artifacts])
                await resume.set_turn(connection, self.lease, turn)
                return row, turn

        begun = await self._patiently(begin)
        if begun is None:
            return None
        saved, self.turn = begun
        self._told = False
        if saved is not None:
            self._keep(saved)
        return self.turn

    async def _end_turn(self, turn: Turn, **changes: Any) -> None:
        """Record the end of the turn, with the changes of the run that belong to it."""
        await self.recorder.flush()
        ended = {"sessionId": self.session_id, "stopReason": turn.stop_reason}
        changes = self.secrets.value(changes)

        async def end() -> Row | None:
            async with self.parts.database.transaction() as connection:
                await runs.lock(connection, self.lease.run_id)
                known = await resume.turn_of(connection, self.lease)
                if known is not None and not known.open:
                    return None  # the answer to an earlier try was lost
                entry = entries.named("_posthog/turn_complete", ended)
                await events.append(connection, self.lease.run_id, [entry], generation=self.lease.generation)
                await resume.set_turn(connection, self.lease, turn)
                return (
                    await lifecycle.change(connection, self.lease.run_id, lease=self.lease, **changes)
                    if changes
                    else None
                )

        saved = await self._patiently(end)
        self.turn = turn
        if saved is not None:
            self._keep(saved)

    def _keep(self, saved: Row) -> None:
        self._row.update({name: saved[name] for name in ("status", "branch", "output")})
        self._row["state"] = as_object(saved["state"])

    async def _take(self, *methods: str) -> list[Letter]:
        """The next command of these methods, if one waits."""
        return await self._patiently(lambda: commands.take(self.parts.database, self.lease, methods, limit=1))

    async def _answer(self, letter: Letter, *, result: Any = None, error: str | None = None) -> None:
        said = None if error is None else self._shown(error)
        await self._patiently(
            lambda: commands.answer(
                self.parts.database,
                self.lease,
                letter.seq,
                result=self.secrets.value(storable(result)),
                error=said,
            )
        )

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Ask the database, again and again while it is away: an outage ends no run."""
        delay = 0.1
        while True:
            try:
                return await work()
            except AWAY as error:
                raise_cancelled()
                log.warning("a run waits for the database", run=self.run_id, error=str(error).strip())
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)

    def _shown(self, text: str) -> str:
        """A text of ours for the record: without secrets, places on this host, and NUL, which PostgreSQL refuses."""
        return self.secrets.text(str(storable(text))).replace(str(self.parts.settings.data_dir), "…")
