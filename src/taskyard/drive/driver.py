"""Drives one run: claim, set-up, turns, publishing, final status, clean-up.

The driver is level triggered: it looks at the run's rows and does what is due. Whatever wakes it, a
command, a status that a client set, the end of a turn, a clock, makes it look again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import structlog

from taskyard.agents.acp import AcpError, AgentGoneError, PromptResult
from taskyard.commands import store as commands
from taskyard.db.engine import Row
from taskyard.db.hub import RUNS, Wake
from taskyard.drive.attachments import AttachmentError, deliver
from taskyard.drive.failures import Ended, ErrorType, OutputGiven, RunFailure
from taskyard.drive.held import Parts
from taskyard.drive.prompt import Message, content_blocks, first_prompt, pending_artifacts
from taskyard.drive.session import AgentSession, start_agent
from taskyard.drive.traffic import usage_state
from taskyard.drive.watch import LOOK_S, URGENT, WatchedRun
from taskyard.drive.work import Work
from taskyard.errors import InvalidInputError, TaskyardError
from taskyard.events import entries
from taskyard.events import store as events
from taskyard.events.store import LeaseLostError
from taskyard.objects.service import open_store
from taskyard.runs import store as runs
from taskyard.runs.output import problem_of
from taskyard.runs.schemas import PENDING_KEYS
from taskyard.runs.store import Lease
from taskyard.sandbox.provider import Limits, Sandbox, Spec
from taskyard.schemas import check_storable
from taskyard.tasks.present import as_object

log = structlog.get_logger()
T = TypeVar("T")

SAVE_S = 600.0
"""Limit for what is still done for a run that ends: its own deadline may be over."""
STOP_S = 20.0
"""A worker that is stopped waits this long for the end of a run to be written."""


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
            closing = asyncio.ensure_future(driver.close())
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                # The worker is stopped; what it connects and knows is there only until this returns.
                await asyncio.wait({closing}, timeout=STOP_S)
                raise
    return True


class Driver(WatchedRun):
    def __init__(self, parts: Parts, lease: Lease, wake: Wake) -> None:
        super().__init__(parts, lease, wake)
        self._task: Row = {}
        self._sandbox: Sandbox | None = None
        self._work: Work | None = None

    # --- the whole way ---

    async def run(self) -> None:
        """From the claimed lease to the final status. Never raises what a run can fail of."""
        try:
            await self._load()
            if self._row["started_at"] is None:
                return
            self._check_first()
            await self._change(status="in_progress")
            await self._set_up()
            await self._converse()
        except Ended:
            log.info("run ended by a client", run=self.run_id)
            # Who stops a run does not want its work; who takes it over does.
            await self._surely(self._salvage(publish=self._handed_over))
        except OutputGiven:
            await self._surely(self._complete())
        except LeaseLostError:
            log.warning("lost the lease of a run", run=self.run_id)
        except RunFailure as failure:
            await self._surely(self._fail(failure.error_type, failure.message))
        except asyncio.CancelledError:
            # One that has not begun stays in the queue, for the next worker.
            if self._row.get("status", "queued") != "queued":
                message = "The server was stopped while this run was going on."
                await self._surely(self._fail("worker_stopped", message), STOP_S)
            raise
        except Exception as error:
            log.exception("driving a run failed", run=self.run_id)
            message = f"Internal error: {type(error).__name__}. See the server's log."
            await self._surely(self._fail("internal_error", message))

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
                steps.push_async_callback(self.recorder.close)
                steps.push_async_callback(self._refuse_commands)
                if self._sandbox is not None:
                    steps.push_async_callback(self._sandbox.destroy)
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
                "SELECT r.*, to_jsonb(t) AS task, p.name AS project_name, u.email, u.first_name, u.last_name"
                " FROM runs r JOIN tasks t ON t.id = r.task_id JOIN projects p ON p.id = r.project_id"
                " LEFT JOIN users u ON u.id = t.created_by_id WHERE r.id = %(run)s",
                run=self.lease.run_id,
            )
        )
        self._row = rows[0] | {"state": as_object(rows[0]["state"])}
        self._task = self._row["task"]

    def _check_first(self) -> None:
        """A run that another worker began cannot be carried on here: its sandbox is gone."""
        if self.lease.attempt > 1 and self._row["status"] != "queued":
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
            await self._attend(self._make_sandbox(spec))
        assert self._sandbox is not None
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
            await self._attend(self._make_agent(self._sandbox, self._work))
        assert self._agent is not None
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

    # Both are kept by what makes them, not by who waits for it: an end of the run may come at the same moment,
    # and what nobody knows of is never freed.

    async def _make_sandbox(self, spec: Spec) -> None:
        self._sandbox = await self.parts.provider.create(spec)

    async def _make_agent(self, sandbox: Sandbox, work: Work) -> None:
        parts = self.parts
        self._agent = await start_agent(
            parts.settings, parts.database, self._row, sandbox, work, self.recorder
        )

    @asynccontextmanager
    async def _step(self, step: str, label: str, error_type: ErrorType) -> AsyncIterator[None]:
        """One step of the set-up, shown as progress; its failure is the run's."""
        self.recorder.add(entries.progress(self.run_id, step, "in_progress", label))
        try:
            yield
        except (Ended, OutputGiven, asyncio.CancelledError, LeaseLostError):
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, "Cancelled"))
            raise
        except RunFailure as failure:
            detail = self._shown(failure.message)
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, detail))
            raise
        except TaskyardError as error:
            detail = self._shown(error.detail)
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, detail))
            raise RunFailure(error_type, detail) from error
        except Exception:
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, "Internal error"))
            raise
        self.recorder.add(entries.progress(self.run_id, step, "completed", label))

    # --- turns ---

    async def _converse(self) -> None:
        """Turn after turn, until the run is over."""
        state = self._row["state"]
        begun = bool(state.get("handoff_resumed")) and await self._patiently(
            lambda: events.has_turns(self.parts.database, self.lease.run_id)
        )
        message = Message(
            first_prompt(state, self._task["description"], begun=begun),
            pending_artifacts(state, self._row["artifacts"]),
        )
        if any(key in self._row["state"] for key in PENDING_KEYS):
            await self._change(remove_state=PENDING_KEYS)
        while True:
            if message and await self._take_turn(message):
                return
            message = await self._next_message()

    async def _take_turn(self, message: Message) -> bool:
        """One turn and its publication; True when the run is complete."""
        agent, work = self._agent, self._work
        assert agent is not None
        assert work is not None
        if self._closed:
            raise RunFailure("follow_up_failed", "Follow-up delivery failed: the agent session was closed.")
        text = message.text or "See the attached files."
        links = await self._attend(self._deliver(work, message))
        for content in ({"type": "text", "text": text}, *links):
            update = {"sessionUpdate": "user_message_chunk", "content": content}
            self.recorder.add(entries.session_update(agent.session_id, update))
        problem: str | None = None
        stop_reason = "error"
        self._turn, self._cancelled_at = True, None
        try:
            result = await self._attend(agent.prompt([*content_blocks(text), *links]), turn=True)
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
        return await self._end_of_work()

    async def _deliver(self, work: Work, message: Message) -> list[dict[str, Any]]:
        """Copy the message's artifacts into the sandbox; their prompt blocks."""
        if not message.artifacts or self._sandbox is None:
            return []
        objects = await open_store(self.parts.settings, self.parts.database)
        try:
            return await deliver(objects, self._sandbox, work.path, self.run_id, message.artifacts)
        except AttachmentError as error:
            raise RunFailure("follow_up_failed", f"Follow-up delivery failed: {error.detail}") from error
        finally:
            await objects.close()

    async def _publish(self, work: Work) -> str | None:
        """Bring new commits to the run's branch; the problem when that failed."""
        try:
            published = await self._attend(work.publish())
        except LeaseLostError:
            raise
        except TaskyardError as error:
            detail = self._shown(error.detail)
            self.recorder.add(
                entries.progress(self.run_id, "publish", "failed", "Publishing the work", detail)
            )
            return detail
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
            check_storable(value)
        except (ValueError, RecursionError, InvalidInputError):
            return False
        if problem_of(schema, value) is not None:
            return False
        await self._change(status="completed", output=value)
        return True

    async def _save_usage(self, agent: AgentSession) -> None:
        if agent.usage.calls:
            await self._change(state={"token_usage": usage_state(agent.usage)})

    async def _next_message(self) -> Message:
        """Wait for the next message; the run completes when none comes for too long."""
        end = self._loop.time() + self._limits.inactivity_s
        while True:
            for letter in await self._take("user_message"):
                await self._answer(letter, result={"queued": True})
                return Message(str(letter.params["content"]), letter.params.get("artifacts") or ())
            if self._quiet_s is not None:
                # Somebody outside works on the run (run-lifecycle §1.1).
                end = max(end, self._loop.time() - self._quiet_s + self._limits.inactivity_s)
            left = min(end, self._deadline) - self._loop.time()
            if left <= 0:
                self._check_deadline()
                message = "Run timed out due to inactivity"
                if await self._end_of_work(error_message=message, state={"timed_out_inactivity": True}):
                    raise Ended
                continue
            self._check_agent_lives()
            await self._wake.wait(min(left, LOOK_S))
            await self._look()

    # --- the end ---

    async def _salvage(self, *, publish: bool) -> None:
        """Bring to safety what the agent has done. What fails here does not hide why the run ends."""
        agent, work = self._agent, self._work
        if agent is None:
            return
        steps: list[Callable[[], Awaitable[object]]] = [agent.close, lambda: self._save_usage(agent)]
        if publish and work is not None:
            steps.insert(1, lambda: self._publish(work))
        for step in steps:
            try:
                await step()
            except LeaseLostError:
                raise
            except RunFailure as failure:
                log.info("saving the work of a run was cut short", run=self.run_id, reason=failure.message)
            except Exception:
                log.exception("saving the work of a run failed", run=self.run_id)

    async def _complete(self) -> None:
        """The output was given: bring what is left of the work to its branch, and end."""
        await self._salvage(publish=True)
        await self._change(status="completed")

    async def _fail(self, error_type: ErrorType, message: str) -> None:
        """Save what can be saved, then set the run failed."""
        log.info("run failed", run=self.run_id, error_type=error_type)
        message = self._shown(message)
        await self._salvage(publish=error_type not in ("publish_failed", "worker_stopped"))
        self.recorder.add(entries.named("_posthog/error", {"sessionId": self.run_id, "message": message}))
        await self._change(status="failed", error_message=message, state={"error_type": error_type})


def _problem(result: PromptResult) -> str | None:
    """Why a turn failed although it ended in form (agents do say `end_turn` then)."""
    if result.failure is not None:
        return result.failure.title
    if result.stop_reason in ("end_turn", "cancelled"):
        return None
    return f"The agent ended its turn: {result.stop_reason}"
