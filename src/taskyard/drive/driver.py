"""Drives one run: claim, set-up, turns, publishing, final status, clean-up.

The driver is level triggered: it looks at the run's rows and does what is due. Whatever wakes it, a
command, a status that a client set, the end of a turn, a clock, makes it look again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import structlog
from jsonschema.validators import validator_for

from taskyard.agents.acp import AcpError, AgentGoneError, PromptResult
from taskyard.commands import store as commands
from taskyard.commands.store import Letter
from taskyard.db.engine import Database, Row
from taskyard.db.hub import RUNS, Hub, Wake
from taskyard.drive.failures import Ended, ErrorType, RunFailure, with_tail
from taskyard.drive.prompt import PENDING_KEYS, content_blocks, first_prompt
from taskyard.drive.recorder import Recorder
from taskyard.drive.session import AgentSession, start_agent, usage_state
from taskyard.drive.work import Work
from taskyard.errors import TaskyardError
from taskyard.events import entries
from taskyard.events.store import LeaseLostError
from taskyard.runs import lifecycle
from taskyard.runs import store as runs
from taskyard.runs.schemas import TERMINAL
from taskyard.runs.store import Lease
from taskyard.sandbox.provider import Limits, Provider, Sandbox, Spec
from taskyard.settings import Settings

log = structlog.get_logger()
T = TypeVar("T")

LOOK_S = 5.0
"""The rows are looked at this often even without a notification."""
CANCEL_S = 10.0
"""An agent that was told to cancel has this long to end its turn."""
URGENT = ("cancel", "close", "permission_response", "set_config_option")
"""Commands that do not wait for the turn to end."""


@dataclass(frozen=True)
class Parts:
    """What every driver of a worker shares."""

    settings: Settings
    database: Database
    hub: Hub
    provider: Provider
    worker: str


async def drive(parts: Parts, run_id: UUID) -> bool:
    """Drive a run to its end. False when another worker holds it at the moment."""
    lease = await runs.claim(parts.database, run_id, parts.worker)
    if lease is None:
        return False
    with parts.hub.subscribe(f"{RUNS}{run_id}") as wake:
        driver = Driver(parts, lease, wake)
        try:
            await driver.run()
        finally:
            await asyncio.shield(driver.close())
    return True


class Driver:
    def __init__(self, parts: Parts, lease: Lease, wake: Wake) -> None:
        self.parts = parts
        self.lease = lease
        self.run_id = str(lease.run_id)
        self._wake = wake
        self._limits = parts.settings.runs
        self._loop = asyncio.get_running_loop()
        self.recorder = Recorder(parts.database, lease, on_lost=wake.set)
        self._renewal = asyncio.create_task(self._renew(), name=f"lease {self.run_id}")
        self._deadline = self._loop.time() + self._limits.wall_clock_s
        self._looked = 0.0
        self._row: Row = {}
        self._task: Row = {}
        self._sandbox: Sandbox | None = None
        self._work: Work | None = None
        self._agent: AgentSession | None = None
        self._turn = False
        self._cancelled_at: float | None = None
        self._closed = False

    # --- the whole way ---

    async def run(self) -> None:
        """From the claimed lease to the final status. Never raises what a run can fail of."""
        try:
            await self._load()
            if self._row["status"] in TERMINAL:
                return
            self._check_first()
            await self._change(status="in_progress")
            await self._set_up()
            await self._converse()
        except Ended:
            log.info("run ended by a client", run=self.run_id)
        except LeaseLostError:
            log.warning("lost the lease of a run", run=self.run_id)
        except RunFailure as failure:
            await self._fail(failure.error_type, failure.message)
        except asyncio.CancelledError:
            with suppress(LeaseLostError):
                await asyncio.shield(
                    self._fail("worker_stopped", "The server was stopped while this run was going on.")
                )
            raise
        except Exception as error:
            log.exception("driving a run failed", run=self.run_id)
            with suppress(LeaseLostError):
                await self._fail(
                    "internal_error", f"Internal error: {type(error).__name__}. See the server's log."
                )

    async def close(self) -> None:
        """Free everything, whatever happened before."""
        try:
            if self._agent is not None:
                await self._agent.close()
            if self._sandbox is not None:
                await self._sandbox.destroy()
        except Exception:
            log.exception("cleaning up a run failed", run=self.run_id)
        finally:
            await self.recorder.close()
            self._renewal.cancel()
            with suppress(asyncio.CancelledError):
                await self._renewal
            await runs.release(self.parts.database, self.lease)

    async def _load(self) -> None:
        rows = await self.parts.database.fetch(
            "SELECT r.*, to_jsonb(t) AS task, p.name AS project_name, u.email, u.first_name, u.last_name"
            " FROM runs r JOIN tasks t ON t.id = r.task_id JOIN projects p ON p.id = r.project_id"
            " LEFT JOIN users u ON u.id = t.created_by_id WHERE r.id = %(run)s",
            run=self.lease.run_id,
        )
        self._row = rows[0]
        self._task = self._row["task"]

    def _check_first(self) -> None:
        """A run that another worker began cannot be carried on here: its sandbox is gone."""
        if self.lease.generation > 1:
            raise RunFailure("worker_lost", "The worker that drove this run died. Start the run again.")

    # --- set-up ---

    async def _set_up(self) -> None:
        limits = self.parts.settings.sandbox
        spec = Spec(
            id=self.run_id,
            limits=Limits(
                cpus=limits.cpus, memory_mb=limits.memory_mb, pids=limits.pids, tmp_mb=limits.tmp_mb
            ),
        )
        async with self._step("sandbox", "Setting up sandbox", "sandbox_failed"):
            self._sandbox = await self._attend(self.parts.provider.create(spec))
        parts = self.parts
        self._work = Work(parts.settings, parts.database, self._row, self._sandbox, self.recorder)
        if repository := self._task["repository"]:
            branch = self._row["branch"]
            label = f"Cloning {repository}" + (f" at {branch}" if branch else "")
            async with self._step("clone", label, "clone_failed"):
                await self._attend(self._work.check_out())
            if branch is None:
                await self._change(state={"pr_base_branch": self._work.base_branch})
        async with self._step("agent", "Starting agent", "agent_start_failed"):
            self._agent = await self._attend(
                start_agent(parts.settings, self._row, self._sandbox, self._work, self.recorder)
            )
        self.recorder.add(
            entries.named(
                "_posthog/run_started",
                {
                    "sessionId": self._agent.session_id,
                    "runId": self.run_id,
                    "taskId": str(self._row["task_id"]),
                    "agentVersion": self._agent.version,
                },
            )
        )

    @asynccontextmanager
    async def _step(self, step: str, label: str, error_type: ErrorType) -> AsyncIterator[None]:
        """One step of the set-up, shown as progress; its failure is the run's."""
        self.recorder.add(entries.progress(self.run_id, step, "in_progress", label))
        try:
            yield
        except (Ended, asyncio.CancelledError, LeaseLostError):
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, "Cancelled"))
            raise
        except RunFailure as failure:
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, failure.message))
            raise
        except TaskyardError as error:
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, error.detail))
            raise RunFailure(error_type, error.detail) from error
        self.recorder.add(entries.progress(self.run_id, step, "completed", label))

    # --- turns ---

    async def _converse(self) -> None:
        """Turn after turn, until the run is over."""
        text = first_prompt(self._row["state"], self._task["description"])
        if any(key in self._row["state"] for key in PENDING_KEYS):
            await self._change(remove_state=PENDING_KEYS)
        while True:
            if text and await self._take_turn(text):
                return
            text = await self._next_message()

    async def _take_turn(self, text: str) -> bool:
        """One turn and its publication; True when the run is complete."""
        agent, work = self._agent, self._work
        assert agent is not None
        assert work is not None
        if self._closed:
            raise RunFailure("follow_up_failed", "Follow-up delivery failed: the agent session was closed.")
        self.recorder.add(
            entries.session_update(
                agent.session_id,
                {"sessionUpdate": "user_message_chunk", "content": {"type": "text", "text": text}},
            )
        )
        problem: str | None = None
        stop_reason = "error"
        self._turn, self._cancelled_at = True, None
        try:
            result = await self._attend(agent.prompt(content_blocks(text)), turn=True)
            stop_reason, problem = result.stop_reason, _problem(result)
        except AcpError as error:
            problem = str(error)
        except AgentGoneError as error:
            raise RunFailure("agent_crashed", await agent.obituary("The agent's process ended")) from error
        finally:
            self._turn = False
        if problem is not None:
            self.recorder.add(
                entries.named("_posthog/error", {"sessionId": agent.session_id, "message": problem})
            )
        failed_publish = await self._publish(work)
        await self._save_usage(agent)
        self.recorder.add(
            entries.named(
                "_posthog/turn_complete", {"sessionId": agent.session_id, "stopReason": stop_reason}
            )
        )
        interactive = self._row["state"].get("mode") == "interactive"
        if problem is not None and not interactive:
            raise RunFailure("agent_error", problem)
        if failed_publish is not None and not interactive:
            raise RunFailure("publish_failed", failed_publish)
        if stop_reason == "end_turn" and await self._structured_output(agent):
            return True
        if interactive or self._limits.background_end != "turn" or stop_reason == "cancelled":
            return False
        if await commands.waiting(self.parts.database, self.lease.run_id):
            return False
        await self._change(status="completed")
        return True

    async def _publish(self, work: Work) -> str | None:
        """Bring new commits to the run's branch; the problem when that failed."""
        try:
            published = await self._attend(work.publish())
        except TaskyardError as error:
            self.recorder.add(
                entries.progress(self.run_id, "publish", "failed", "Publishing the work", error.detail)
            )
            return error.detail
        if published is not None:
            label = f"Published {published.branch}"
            detail = f"{published.commits} commit{'s' if published.commits != 1 else ''}"
            self.recorder.add(entries.progress(self.run_id, "publish", "completed", label, detail))
            output = {"head_branch": published.branch, "commit_sha": published.commit}
            await self._change(branch=published.branch, merge_output=output)
        return None

    async def _structured_output(self, agent: AgentSession) -> bool:
        """With a schema on the task: a last message that is fitting JSON becomes the output, and ends the run."""
        schema = self._task["json_schema"]
        if schema is None:
            return False
        try:
            value = json.loads(agent.last_message)
        except ValueError:
            return False
        if not validator_for(schema)(schema).is_valid(value):
            return False
        await self._change(status="completed", output=value)
        return True

    async def _save_usage(self, agent: AgentSession) -> None:
        if agent.usage.calls:
            await self._change(state={"token_usage": usage_state(agent.usage)})

    async def _next_message(self) -> str:
        """Wait for the next message; the run completes when none comes for too long."""
        end = self._loop.time() + self._limits.inactivity_s
        while True:
            letters = await commands.take(self.parts.database, self.lease, ("user_message",), limit=1)
            if letters:
                await commands.answer(
                    self.parts.database, self.lease, letters[0].seq, result={"queued": True}
                )
                return str(letters[0].params["content"])
            left = min(end, self._deadline) - self._loop.time()
            if left <= 0:
                self._check_deadline()
                await self._change(
                    status="completed",
                    error_message="Run timed out due to inactivity",
                    state={"timed_out_inactivity": True},
                )
                raise Ended
            self._check_agent_lives()
            await self._wake.wait(min(left, LOOK_S))
            await self._look()

    # --- watching ---

    async def _attend(self, work: Coroutine[Any, Any, T], *, turn: bool = False) -> T:
        """Do something that takes time while commands, clocks and the lease are watched."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._wake.set())
        try:
            while not task.done():
                await self._wake.wait(self._until_next_check(turn))
                if not task.done():
                    await self._look()
                    self._check_deadline()
                    if turn:
                        self._check_silence()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    def _until_next_check(self, turn: bool) -> float:
        wait = min(LOOK_S, max(self._deadline - self._loop.time(), 0.01))
        if turn:
            wait = min(wait, self._limits.agent_silence_s / 4, 1.0 if self._cancelled_at else LOOK_S)
        return wait

    async def _look(self) -> None:
        """Look at the run's rows: has a client ended it, is there an urgent command?"""
        if self.recorder.lost:
            raise LeaseLostError
        row = await self.parts.database.fetch_one(
            "SELECT status FROM runs WHERE id = %(run)s", run=self.lease.run_id
        )
        if row is None or row["status"] in TERMINAL:
            raise Ended
        for letter in await commands.take(self.parts.database, self.lease, URGENT):
            result, error = None, None
            try:
                result = await self._obey(letter)
            except (LookupError, AcpError, AgentGoneError) as problem:
                error = str(problem.args[0]) if problem.args else type(problem).__name__
            await commands.answer(self.parts.database, self.lease, letter.seq, result=result, error=error)

    async def _obey(self, letter: Letter) -> dict[str, Any]:
        agent = self._agent
        if agent is None:
            raise LookupError("the agent is not ready yet; try again when the run has started")
        if letter.method == "cancel":
            if self._turn:
                self._cancelled_at = self._cancelled_at or self._loop.time()
                await agent.cancel()
            return {"cancelled": True}
        if letter.method == "permission_response":
            agent.permissions.resolve(letter.params)
            return {"resolved": True}
        if letter.method == "close":
            self._closed = True
            if self._turn:
                await agent.cancel()
            return {"closed": True}
        options = await agent.set_config_option(letter.params["configId"], letter.params["value"])
        return {"configOptions": options}

    def _check_silence(self) -> None:
        agent = self._agent
        assert agent is not None
        now = self._loop.time()
        if self._cancelled_at is not None and now - self._cancelled_at > CANCEL_S:
            message = f"The agent did not stop its turn within {CANCEL_S:g} seconds of a cancel."
            raise RunFailure("agent_unresponsive", with_tail(message, agent.stderr_tail()))
        silence = now - max(agent.last_message_at, agent.prompted_at, agent.permissions.answered_at)
        if silence > self._limits.agent_silence_s and not agent.permissions.waiting:
            message = f"The agent sent nothing for {self._limits.agent_silence_s:g} seconds in the middle of a turn."
            raise RunFailure("agent_silent", with_tail(message, agent.stderr_tail()))

    def _check_deadline(self) -> None:
        if self._loop.time() >= self._deadline:
            raise RunFailure("deadline", f"The run took longer than {self._limits.wall_clock_s:g} seconds.")

    def _check_agent_lives(self) -> None:
        if self._agent is not None and self._agent.gone and not self._closed:
            raise RunFailure("agent_crashed", self._agent.epitaph("The agent's process ended between turns"))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(runs.LEASE_S / 3)
            with contextlib.suppress(TaskyardError, OSError):
                if not await runs.renew(self.parts.database, self.lease):
                    self.recorder.lost = True
                    self._wake.set()
                    return

    # --- the record ---

    async def _change(self, **changes: Any) -> None:
        """Change the run under the lease, behind everything that was recorded before."""
        await self.recorder.flush()
        async with self.parts.database.transaction() as connection:
            saved = await lifecycle.change(connection, self.lease.run_id, lease=self.lease, **changes)
        self._row.update({name: saved[name] for name in ("status", "state", "branch", "output")})

    async def _fail(self, error_type: ErrorType, message: str) -> None:
        """Save what can be saved, then set the run failed."""
        log.info("run failed", run=self.run_id, error_type=error_type)
        if self._agent is not None:
            await self._agent.close()
            if self._work is not None and error_type not in ("publish_failed", "worker_stopped"):
                with suppress(RunFailure, Ended, TaskyardError):
                    await self._publish(self._work)
            await self._save_usage(self._agent)
        self.recorder.add(entries.named("_posthog/error", {"sessionId": self.run_id, "message": message}))
        await self._change(status="failed", error_message=message, state={"error_type": error_type})


def _problem(result: PromptResult) -> str | None:
    """Why a turn failed although it ended in form (agents do say `end_turn` then)."""
    if result.failure is not None:
        return result.failure.title
    if result.stop_reason in ("end_turn", "cancelled"):
        return None
    return f"The agent ended its turn: {result.stop_reason}"
