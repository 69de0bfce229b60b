"""Drives one run: claim, set-up, turns, publishing, final status, clean-up.

The driver is level triggered: it looks at the run's rows and does what is due. Whatever wakes it, a
command, a status that a client set, the end of a turn, a clock, makes it look again.

There is one way into a run, be it new, interrupted by the loss of its worker or agent, handed over by a worker
that stopped, asleep until now, or the continuation of another run: set it up from what there is (nothing, the
folder that is still here, or a checkpoint), open the agent's session, and go on where the turn says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any
from uuid import UUID

import structlog

from taskyard.commands import store as commands
from taskyard.db.engine import AWAY, raise_cancelled
from taskyard.db.hub import RUNS
from taskyard.drive.failures import AgentLost, BudgetSpent, Ended, ErrorType, Leave, OutputGiven, RunFailure
from taskyard.drive.held import Parts
from taskyard.drive.setup import PreparingRun
from taskyard.drive.traffic import budget_end
from taskyard.drive.transcript import left_unjoined
from taskyard.drive.watch import URGENT
from taskyard.events import entries
from taskyard.events.store import LeaseLostError
from taskyard.jobs import enqueue_drive
from taskyard.runs import lifecycle, resume
from taskyard.runs import store as runs
from taskyard.tasks.present import as_object

log = structlog.get_logger()

SAVE_S = 600.0
"""Limit for what is still done for a run that ends: its own deadline may be over."""
STOP_S = 20.0
"""A worker that is stopped waits this long for the end of a run to be written."""


async def drive(parts: Parts, run_id: UUID) -> bool:
    """Drive a run until it ends, or sleeps, or the worker stops. False when another worker holds it."""
    claimed = await runs.claim(parts.database, run_id, parts.worker, parts.place, taken=True)
    if claimed is None:
        return False
    with parts.hub.subscribe(f"{RUNS}{run_id}") as wake, parts.drain.heard_by(wake):
        driver = Driver(parts, claimed, wake)
        try:
            await driver.run()
        finally:
            closing = asyncio.ensure_future(driver.close())
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                # The worker is stopped; what it connects and knows is there only until this returns.
                await asyncio.wait({closing}, timeout=STOP_S)
                raise
    return True


class Driver(PreparingRun):
    _stays = False
    """The folder of the sandbox stays for the next worker here."""

    async def run(self) -> None:
        """From the claimed lease until the run is let go of. Never raises what a run can fail of."""
        try:
            await self._load()
            await self._join_text()
            if self._row["started_at"] is None:
                return
            self._resumed = self._row["status"] != "queued" and self.lease.attempt > 1
            self._check_resumes(self.claimed.resumes, "worker_lost", "The worker that drove this run died.")
            await self._change(status="in_progress", remove_state=("suspended",))
            await self._go()
        except Ended:
            log.info("run ended by a client", run=self.run_id)
            # Who stops a run does not want its work; who takes it over does.
            await self._surely(self._salvage(publish=self._handed_over))
        except OutputGiven:
            await self._surely(self._complete())
        except BudgetSpent as spent:
            await self._surely(self._end_over_budget(spent.reason))
        except Leave:
            await self._surely(self._let_go())
        except LeaseLostError:
            log.warning("lost the lease of a run", run=self.run_id)
        except RunFailure as failure:
            await self._surely(self._fail(failure.error_type, failure.message))
        except asyncio.CancelledError:
            # The next worker goes on with it.
            self._stays = self._resumable
            raise
        except Exception as error:
            log.exception("driving a run failed", run=self.run_id)
            message = f"Internal error: {type(error).__name__}. See the server's log."
            await self._surely(self._fail("internal_error", message))

    async def _go(self) -> None:
        """Set up and converse; once more when the agent is lost on the way."""
        while True:
            if await self._has_nothing_to_do():
                raise Leave
            try:
                await self._set_up()
                await self._converse()
            except AgentLost as lost:
                if lost.counts:
                    resumes = await self._patiently(
                        lambda: resume.count_resume(self.parts.database, self.lease)
                    )
                    self._check_resumes(resumes, "agent_lost", lost.message)
                log.warning("the agent of a run was lost, starting it again", run=self.run_id)
                text = f"{lost.message} The work goes on with a new process."
                self.recorder.add(entries.console(self.run_id, "warn", self._shown(text)))
                await self._drop_agent()
            except AWAY as error:
                raise_cancelled()
                log.warning("a run waits for the database", run=self.run_id, error=str(error).strip())
                await self._patiently(lambda: self.parts.database.fetch("SELECT 1"))
                await self._drop_agent()
            else:
                return

    async def _has_nothing_to_do(self) -> bool:
        """Whether the run waits for a message, safely kept: it then needs neither sandbox nor agent."""
        turn = self.turn
        if turn is None or turn.open:
            return False
        await self._look()
        if self._mail:
            return False
        if await self._conclude():
            raise Ended
        self._due_s = self._inactivity_s - self._idle_s
        return turn.saved

    def _check_resumes(self, resumes: int, error_type: ErrorType, message: str) -> None:
        limit = self._limits.max_attempts
        if resumes > limit:
            times = f"{resumes} times in a row" if resumes > 1 else "once"
            raise RunFailure(
                error_type, f"{message} That happened {times} without progress; the limit is {limit}."
            )

    async def _drop_agent(self) -> None:
        """Free an agent that is lost, or whose work cannot be followed; the sandbox stays if it can be used."""
        agent, self._agent = self._agent, None
        self._resumed = True
        if agent is not None:
            await agent.close(in_turn=True)
        if self._cutting is not None:
            await asyncio.wait({self._cutting})

    async def _surely(self, work: Coroutine[Any, Any, None], limit_s: float | None = None) -> None:
        """The last steps of a run. A stop of the worker cuts them short, but not before the end is written.

        Should they fail, the run is still open when the lease is given back; a worker then takes it over.
        """
        self._ending = True
        self._deadline = self._loop.time() + SAVE_S
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task}, timeout=limit_s)
        except asyncio.CancelledError:
            self._deadline = self._loop.time()
            self._wake.set()
            await asyncio.wait({task}, timeout=STOP_S)
            raise
        finally:
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                log.warning("the end of a run was not written in time", run=self.run_id)
            except LeaseLostError:
                log.warning("lost the lease of a run", run=self.run_id)
            except Exception:
                log.exception("ending a run failed", run=self.run_id)

    async def close(self) -> None:
        """Free everything, whatever happened before."""
        try:
            async with AsyncExitStack() as steps:  # from the last to the first, each whatever the others do
                steps.push_async_callback(runs.release, self.parts.database, self.lease)
                steps.push_async_callback(asyncio.wait, {self._renewal})
                steps.callback(self._renewal.cancel)
                steps.callback(self._forget_secrets)
                steps.push_async_callback(self.recorder.close)
                steps.push_async_callback(self._refuse_commands)
                if self._sandbox is not None:
                    free = self._sandbox.detach if self._stays else self._sandbox.destroy
                    steps.push_async_callback(free)
                if self._cutting is not None:
                    steps.push_async_callback(asyncio.wait, {self._cutting})
                if self._agent is not None:
                    steps.push_async_callback(self._agent.close)
        except Exception:
            log.exception("cleaning up a run failed", run=self.run_id)

    async def _refuse_commands(self) -> None:
        """Nobody takes what is left in the mailbox of a run that has ended: say so to who waits, and in the record."""
        database, lease = self.parts.database, self.lease
        if (await runs.watch(database, lease)).wanted:
            return
        while letters := await commands.take(database, lease, (*URGENT, "user_message")):
            for letter in letters:
                if letter.method == "user_message":
                    text = "A message was not delivered to the agent: the run had ended."
                    self.recorder.add(entries.console(self.run_id, "warn", text))
                await commands.answer(database, lease, letter.seq, error="the run has ended")

    async def _load(self) -> None:
        rows = await self._patiently(
            lambda: self.parts.database.fetch(
                "SELECT r.*, to_jsonb(t) AS task, p.name AS project_name, u.email, u.first_name, u.last_name,"
                " c.pushed FROM runs r JOIN run_cursors c ON c.run_id = r.id"
                " JOIN tasks t ON t.id = r.task_id JOIN projects p ON p.id = r.project_id"
                " LEFT JOIN users u ON u.id = t.created_by_id WHERE r.id = %(run)s",
                run=self.lease.run_id,
            )
        )
        self._row = rows[0] | {"state": as_object(rows[0]["state"])}
        self._task = self._row["task"]

    async def _join_text(self) -> None:
        """Who drove the run before may have been killed with a message half told: then the log has it from here."""
        lease = self.lease
        if lease.generation > 1:
            left = await self._patiently(lambda: left_unjoined(self.parts.database, lease.run_id))
            self.recorder.add(*left)

    # --- letting go ---

    @property
    def _resumable(self) -> bool:
        return self._keeper is not None and self._keeper.newest is not None

    async def _let_go(self) -> None:
        """Give the run back although it has not ended: it sleeps until a command comes, or goes on elsewhere."""
        turn, agent = self.turn, self._agent
        waits = turn is None or not turn.open
        saved = bool(turn and not turn.open and turn.saved) or await self._keep_state(progress=False)
        asked: list[dict[str, Any]] = []
        if agent is not None:
            asked = agent.permissions.requests if not waits else []
            await agent.close(in_turn=not waits)
            await self._save_usage(agent)
        may_sleep = saved and turn is not None and (waits or bool(asked))
        if turn is not None:
            turn = replace(turn, permissions=asked, saved=saved and not turn.open)
        left = self._ends_at - self._loop.time()
        due_s = max(min(self._due_s, left) if waits else left, 0.0)
        await self.recorder.flush()

        async def let_go() -> bool:
            """Whether nobody has to drive it now."""
            async with self.parts.database.transaction() as connection:
                row = await runs.lock(connection, self.lease.run_id)
                if row is None or row["started_at"] is None:
                    return True
                if turn is not None:
                    await resume.set_turn(connection, self.lease, turn)
                if (
                    not may_sleep
                    or await commands.any_waits(connection, self.lease.run_id, turn_open=not waits)
                    or await resume.is_completing(connection, self.lease)
                ):
                    await enqueue_drive(connection, self.lease.run_id)
                    return False
                await lifecycle.change(
                    connection, self.lease.run_id, lease=self.lease, state={"suspended": True}
                )
                await resume.suspend(connection, self.lease, due_s)
                return True

        asleep = await self._patiently(let_go)
        self._stays = not asleep and self._resumable
        log.info("let go of a run", run=self.run_id, asleep=asleep)

    # --- the end ---

    async def _salvage(self, *, publish: bool) -> None:
        """Bring to safety what the agent has done. What fails here does not hide why the run ends."""
        agent, work = self._agent, self._work
        steps: list[Callable[[], Awaitable[object]]] = []
        if agent is not None:
            steps.append(agent.close)
        if publish and work is not None and (agent is not None or self._whole):
            steps.append(lambda: self._publish(work))
        if agent is not None:
            steps.append(lambda: self._save_usage(agent))
        if publish and work is not None:
            steps.append(lambda: self._keep_state(progress=False))
        for step in steps:
            try:
                await step()
            except LeaseLostError:
                raise
            except RunFailure as failure:
                log.info("saving the work of a run was cut short", run=self.run_id, reason=failure.message)
            except Exception:
                log.exception("saving the work of a run failed", run=self.run_id)

    async def _complete(self, **changes: Any) -> None:
        """The output was given: bring what is left of the work to its branch, and end."""
        await self._salvage(publish=True)
        await self._change(status="completed", **changes)

    async def _complete_cut_short(self, reason: str) -> None:
        """The turn was cut short in which the agent has given its result: that is what the run was for."""
        text = f"The agent's turn was cut short after it gave its result: {self._shown(reason)}"
        self.recorder.add(entries.console(self.run_id, "warn", text))
        await self._complete(**self._given)

    async def _end_over_budget(self, reason: str) -> None:
        """The budget is used up: the work so far is kept, and the run ends as the site has set it, with the reason."""
        if self._given:
            await self._complete_cut_short(reason)
            return
        end = budget_end(self.parts.settings, reason)
        if end.status == "failed":
            await self._fail("budget_exceeded", end.message)
            return
        await self._salvage(publish=True)
        self.recorder.add(entries.console(self.run_id, "warn", end.message))
        await self._change(status="completed", error_message=end.message, state={"budget_exceeded": True})

    async def _fail(self, error_type: ErrorType, message: str) -> None:
        """Save what can be saved, then set the run failed."""
        if self._given:
            await self._complete_cut_short(message)
            return
        log.info("run failed", run=self.run_id, error_type=error_type)
        message = self._shown(message)
        await self._salvage(publish=error_type != "publish_failed")
        self.recorder.add(entries.named("_posthog/error", {"sessionId": self.run_id, "message": message}))
        await self._change(status="failed", error_message=message, state={"error_type": error_type})
