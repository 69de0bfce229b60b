"""The conversation of a run: turn after turn, each with its publication and its checkpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from taskyard.agents.acp import AcpError, AgentGoneError, PromptResult
from taskyard.agents.adapters import adapters
from taskyard.db.engine import Row
from taskyard.db.hub import Wake
from taskyard.drive.attachments import AttachmentError, deliver
from taskyard.drive.checkpoint import Keeper
from taskyard.drive.failures import INACTIVE, AgentLost, Ended, ErrorType, Leave, RunFailure
from taskyard.drive.held import Parts
from taskyard.drive.history import conversation
from taskyard.drive.prompt import (
    Message,
    content_blocks,
    continuation,
    first_prompt,
    pending_artifacts,
    text_block,
    with_history,
)
from taskyard.drive.result import HINT, problem_of
from taskyard.drive.session import AgentSession
from taskyard.drive.space import no_space
from taskyard.drive.traffic import spending
from taskyard.drive.watch import LOOK_S, WatchedRun
from taskyard.drive.work import Work
from taskyard.errors import TaskyardError
from taskyard.events import entries
from taskyard.events import store as events
from taskyard.events.record import Record
from taskyard.events.store import LeaseLostError
from taskyard.runs import resume
from taskyard.runs import store as runs
from taskyard.runs.resume import Turn
from taskyard.runs.store import Claimed
from taskyard.sandbox.provider import KilledError, Sandbox

log = structlog.get_logger()
Json = dict[str, Any]
T = TypeVar("T")

TRIES = 3
FULL_S, FULL_LOOK_S = 60.0, 2.0
"""How long publishing waits for space on the disk, and a checkpoint for that or for a storage that is away."""


class ConversingRun(WatchedRun):
    def __init__(self, parts: Parts, claimed: Claimed, wake: Wake) -> None:
        super().__init__(parts, claimed, wake)
        self._task: Row = {}
        self._sandbox: Sandbox | None = None
        self._work: Work | None = None
        self._keeper: Keeper | None = None
        self._whole = False
        """The sandbox has all that an agent left there, also when the next one does not start."""
        self._idle_s = claimed.idle_s
        self._submitting = asyncio.Lock()

    @property
    def _interactive(self) -> bool:
        return bool(self._row["state"].get("mode") == "interactive")

    async def _converse(self) -> None:
        """Turn after turn, until the run is over."""
        if self.turn is None:
            state = self._row["state"]
            begun = bool(state.get("handoff_resumed")) and await self._patiently(
                lambda: events.has_turns(self.parts.database, self.lease.run_id)
            )
            message = Message(
                first_prompt(state, self._task["description"], begun=begun),
                pending_artifacts(state, self._row["artifacts"]),
            )
            if message:
                await self._begin_turn(message)
        while True:
            if self.turn and self.turn.open and await self._take_turn(self.turn):
                return
            await self._next_turn()

    async def _take_turn(self, turn: Turn) -> bool:
        """One turn, its publication and its checkpoint; True when the run is complete.

        One whose message an agent was told already goes on: it was interrupted.
        """
        agent, work, again = self._agent, self._work, self._told
        assert agent is not None
        assert work is not None
        if self._closed:
            raise RunFailure("follow_up_failed", "Follow-up delivery failed: the agent session was closed.")
        links = await self._attend(self._deliver(work, turn))
        if not again:
            for content in links:
                update = {"sessionUpdate": "user_message_chunk", "content": content}
                self.recorder.add(entries.session_update(agent.session_id, update))
        blocks = await self._blocks(agent, turn, again=again)
        self._check_budget()
        if not self._stands.is_set():
            await self._attend(self._stands.wait())
        await self._check_agent_lives()
        if again:
            await self._look()  # the answer to what it is about to ask may be there
        stop_reason: str = "cancelled"
        problem: str | None = None
        if not self._skipped:
            self._told = True
            stop_reason, problem = await self._prompt(agent, [*blocks, *links])
        self._check_budget()
        agent.permissions.forget()
        if problem is not None:
            self.recorder.add(
                entries.named("_posthog/error", {"sessionId": agent.session_id, "message": problem})
            )
        failed_publish = await self._publish(work)
        await self._save_usage(agent)
        failure: tuple[ErrorType, str] | None = None
        if problem is not None and not self._interactive and not self._given:
            failure = ("agent_error", problem)
        elif failed_publish is not None and not self._interactive:
            failure = ("publish_failed", failed_publish)
        well = stop_reason == "end_turn" and failure is None
        changes = await self._output(agent.last_message if well else "")
        # Who cancels a turn has something else in mind.
        completes = bool(changes) and failure is None and stop_reason != "cancelled"
        if completes:
            changes["status"] = "completed"
        saved = await self._attend(self._keep_surely())
        self._idle_s = 0.0
        await self._end_turn(
            replace(
                turn, open=False, permissions=(), stop_reason=stop_reason, saved=saved, failure=failure or ()
            ),
            **changes,
        )
        self._skipped = False
        return completes or await self._conclude()

    async def _prompt(self, agent: AgentSession, blocks: Sequence[Json]) -> tuple[str, str | None]:
        """Have the agent work until it ends its turn: why it stopped, and the problem if that was one."""
        self._turn, self._cancelled_at = True, None
        try:
            async with self._kept_often():
                result = await self._attend(agent.prompt(blocks), turn=True)
        except AcpError as error:
            return "error", str(error)
        except AgentGoneError as error:
            raise await agent.death("The agent's process ended", "agent_crashed") from error
        finally:
            self._turn = False
            async with self._submitting:
                pass  # a result that the agent has begun to give counts
        return result.stop_reason, _problem(result)

    async def _conclude(self) -> bool:
        """What follows from the end of the newest turn; True when the run is complete."""
        turn = self.turn
        assert turn is not None
        if turn.failure:
            raise RunFailure(turn.failure[0], turn.failure[1])  # type: ignore[arg-type] # stored by ourselves
        stays = self._interactive or self._limits.background_end != "turn"
        if stays or turn.stop_reason == "cancelled":
            return False
        return await self._end_of_work()

    async def _blocks(self, agent: AgentSession, turn: Turn, *, again: bool) -> list[Json]:
        """What the agent is told: the message; more for an agent that goes on with a turn, or knows nothing of it."""
        blocks = continuation(turn.text) if again else content_blocks(turn.text)
        known = agent.loaded or agent.prompted
        history = "" if known else await self._history(turn, again=again)
        if history:
            blocks = with_history(history, blocks)
        if agent.takes_tools and not agent.prompted:
            blocks = [*blocks, text_block(HINT)]
        return blocks

    async def _history(self, turn: Turn, *, again: bool) -> str:
        """What was said before, in this run and those that it resumes."""
        state = self._row["state"]
        begun = turn.number > 1 or again or bool(state.get("handoff_resumed"))
        if not begun and "resume_from_run_id" not in state:
            return ""
        earlier = await self._patiently(lambda: runs.chain(self.parts.database, self._row))
        wanted = earlier if begun else earlier[:-1]
        if not wanted:
            return ""
        await self.recorder.flush()
        return await self._patiently(
            lambda: conversation(Record(self.parts.database, self.parts.objects), wanted)
        )

    async def _deliver(self, work: Work, turn: Turn) -> list[Json]:
        """Copy the message's artifacts into the sandbox; their prompt blocks."""
        if not turn.artifacts or self._sandbox is None:
            return []
        try:
            return await deliver(self.parts.objects, self._sandbox, work.path, self.run_id, turn.artifacts)
        except KilledError as error:
            raise AgentLost(f"Delivering the files of a message was cut short: {error.detail}.") from error
        except AttachmentError as error:
            raise RunFailure("follow_up_failed", f"Follow-up delivery failed: {error.detail}") from error

    async def _publish(self, work: Work) -> str | None:
        """Bring new commits to the run's branch; the problem when that failed."""
        try:
            published = await self._attend(self._persistently(work.publish))
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

    async def _persistently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something in the sandbox again when it is killed on the way, or the disk is full."""
        kills, waits = 0, 0
        while True:
            try:
                return await work()
            except KilledError:
                kills += 1
                if kills == TRIES:
                    raise
            except TaskyardError as error:
                waits += 1
                full = await asyncio.to_thread(no_space, self.parts.settings.data_dir, error.detail)
                if not full or waits > FULL_S / FULL_LOOK_S:
                    raise
                log.warning("the disk is full, trying again", run=self.run_id, reason=error.detail)
                await asyncio.sleep(FULL_LOOK_S)

    async def _submit(self, value: Any) -> str | None:
        """Keep a result that the agent gives by its tool until the turn ends, in place of an earlier one.

        Why it is not taken, or None. It is stored first, so that no other worker has to ask for it again.
        """
        async with self._submitting:
            if not self._turn:
                return "No turn is on. Call the tool while you work on a message."
            if (problem := await problem_of(self._task["json_schema"], value)) is not None:
                return problem
            result = [self.secrets.value(value)]

            async def keep() -> bool:
                async with self.parts.database.transaction() as connection:
                    turn = await resume.turn_of(connection, self.lease)
                    if turn is None or not turn.open:
                        return False
                    await resume.set_turn(connection, self.lease, replace(turn, result=result))
                    return True

            with suppress(LeaseLostError):  # noticed by whoever watches the run
                if await self._patiently(keep) and self.turn is not None:
                    self.turn = replace(self.turn, result=result)
                    return None
            return "The turn has ended."

    @property
    def _given(self) -> Json:
        """The output that the agent gave by its tool in the turn that is on, as a change of the run; {}: none."""
        return {} if self.turn is None else self.turn.output

    async def _output(self, last_message: str) -> Json:
        """With a schema on the task, the change that a result makes to the run; {} without a result.

        It is what the agent gave by its tool, else a last message that is fitting JSON.
        """
        schema = self._task["json_schema"]
        if self._given:
            return self._given
        try:
            value = json.loads(last_message)
        except (ValueError, RecursionError):
            return {}
        if schema is None or await problem_of(schema, value) is not None:
            return {}
        return {"output": value}

    async def _save_usage(self, agent: AgentSession) -> None:
        if agent.usage.calls:
            await self._change(state=spending(agent.usage))

    # --- checkpoints ---

    async def _keep_state(self, *, progress: bool) -> bool:
        """Make a checkpoint; False when there is none of this moment."""
        keeper, agent = self._keeper, self._agent
        if keeper is None or self._sandbox is None or self._work is None:
            return False
        if agent is not None:
            adapter, session_id = agent.adapter, agent.session_id or None
        elif self._whole and (newest := keeper.newest) is not None:
            adapter, session_id = adapters(self.parts.settings)[newest.agent], newest.session_id
        else:
            return False
        return await keeper.save(self._sandbox, self._work, adapter, session_id, progress=progress)

    async def _keep_surely(self) -> bool:
        """The same at the end of a turn: the work since the last one must not be lost because something is away."""
        end = self._loop.time() + FULL_S
        while not (saved := await self._keep_state(progress=True)):
            if self._keeper is None or self._keeper.hopeless or self._loop.time() > end:
                break
            await self._patiently(lambda: self.parts.database.fetch("SELECT 1"))
            await asyncio.sleep(FULL_LOOK_S)
        return saved

    async def _is_kept(self) -> bool:
        """Whether nothing is lost when the sandbox goes."""
        return bool(self.turn and self.turn.saved) or await self._keep_state(progress=False)

    @asynccontextmanager
    async def _kept_often(self) -> AsyncIterator[None]:
        """Make checkpoints while a turn goes on."""

        async def keep() -> None:
            while True:
                await asyncio.sleep(self._limits.checkpoint_s)
                with suppress(LeaseLostError):  # noticed by whoever watches the run
                    await self._keep_state(progress=True)

        task = asyncio.create_task(keep(), name=f"checkpoints {self.run_id}")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    # --- between turns ---

    async def _next_turn(self) -> None:
        """Wait for the next message and begin its turn.

        The run completes when none comes for too long; before that it is let go of (Leave).
        """
        begun = self._loop.time()
        end = begun - self._idle_s + self._inactivity_s
        sleep = begun + self._limits.suspend_after_s
        while True:
            await self._look()
            if self._mail and await self._begin_turn() is not None:
                return
            now = self._loop.time()
            if self._quiet_s is not None:
                # Somebody outside works on the run (run-lifecycle §1.1).
                end = max(end, now - self._quiet_s + self._inactivity_s)
            self._due_s = end - now
            if self.parts.drain.until is not None:
                raise Leave
            if now >= sleep and now < end:
                if await self._attend(self._is_kept()):
                    raise Leave
                sleep = now + self._limits.suspend_after_s  # it may be too large: then it stays as it is
            left = min(end, self._deadline) - now
            if left <= 0:
                self._check_deadline()
                await self._time_out()
                continue
            await self._check_agent_lives()
            await self._wake.wait(min(left, max(sleep - now, 0.01), LOOK_S))

    async def _time_out(self) -> None:
        if await self._end_of_work(error_message=INACTIVE, state={"timed_out_inactivity": True}):
            raise Ended


def _problem(result: PromptResult) -> str | None:
    """Why a turn failed although it ended in form (agents do say `end_turn` then)."""
    if result.failure is not None:
        return result.failure.title
    if result.stop_reason in ("end_turn", "cancelled"):
        return None
    return f"The agent ended its turn: {result.stop_reason}"
