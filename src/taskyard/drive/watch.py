"""Watching a run while something goes on: what clients want of it, its clocks, its agent."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from taskyard.agents.acp import AcpError, AgentGoneError
from taskyard.commands.store import Letter
from taskyard.db.hub import Wake
from taskyard.drive.failures import (
    BudgetSpent,
    Ended,
    Leave,
    OutputGiven,
    RunFailure,
    too_long,
    with_tail,
)
from taskyard.drive.held import HeldRun, Parts
from taskyard.drive.session import AgentSession
from taskyard.events.store import LeaseLostError
from taskyard.runs import store as runs
from taskyard.runs.store import Claimed

log = structlog.get_logger()
T = TypeVar("T")

LOOK_S = 5.0
"""The rows are looked at this often even without a notification."""
CANCEL_S = 10.0
"""An agent that was told to cancel has this long to end its turn."""
URGENT = ("cancel", "close", "permission_response", "set_config_option")
"""Commands that do not wait for the turn to end."""
MAX_INACTIVITY_S = 7200.0
OBEY_S = 10.0
"""An agent that does not answer a command in this time does not hold up the watching of its run."""


class WatchedRun(HeldRun):
    def __init__(self, parts: Parts, claimed: Claimed, wake: Wake) -> None:
        super().__init__(parts, claimed, wake)
        self._limits = parts.settings.runs
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + self._limits.wall_clock_s - claimed.driven_s
        self._deadline = self._ends_at
        self._resumed = False
        """What goes on here was begun by an earlier worker, or before the run slept."""
        self._due_s = 0.0
        """Seconds until the run ends by itself, if nothing happens."""
        self._agent: AgentSession | None = None
        self._cutting: asyncio.Task[None] | None = None
        """Stops an agent that may not go on."""
        self._turn = False
        """The agent works on a message."""
        self._skipped = False
        """The open turn was cancelled while the agent did not work on it."""
        self._cancelled_at: float | None = None
        self._closed = False
        self._ending = False
        self._handed_over = False
        self._quiet_s: float | None = None
        self._mail = False
        """A command waited when the rows were looked at."""

    @property
    def session_id(self) -> str:
        return (self._agent.session_id if self._agent else "") or self.run_id

    @property
    def _inactivity_s(self) -> float:
        """How long the run waits for a message (run-lifecycle §2): its own limit, at most two hours."""
        own = self._row["state"].get("inactivity_timeout_seconds")
        if isinstance(own, (int, float)) and not isinstance(own, bool) and own > 0:
            return min(float(own), MAX_INACTIVITY_S)
        return self._limits.inactivity_s

    def _cut_off(self) -> None:
        super()._cut_off()
        log.warning("a run is cut off from the database, its agent is stopped", run=self.run_id)
        if self._agent is not None:
            self._cutting = asyncio.create_task(self._agent.cut_off(), name=f"cut off {self.run_id}")

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
                    self._check_drain()
                    if turn:
                        self._check_budget()
                        self._check_silence()
                        self._check_waiting()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    def _until_next_check(self, turn: bool) -> float:
        wait = min(LOOK_S, max(self._deadline - self._loop.time(), 0.01))
        if not self._ending and (until := self.parts.drain.until) is not None:
            wait = min(wait, max(until - self._loop.time(), 0.01))
        if turn:
            wait = min(wait, self._limits.agent_silence_s / 4, 1.0 if self._cancelled_at else LOOK_S)
        return wait

    async def _look(self) -> None:
        """Look at the run's rows: has a client ended it, is there an urgent command?"""
        seen = await self._patiently(lambda: runs.watch(self.parts.database, self.lease))
        if self.recorder.lost or not seen.held:
            self.recorder.lost = True
            raise LeaseLostError
        if self._ending:
            return
        if not seen.wanted:
            self._handed_over = not seen.ended
            raise Ended
        if seen.completing:
            raise OutputGiven
        self._quiet_s = seen.quiet_s
        self._mail = seen.mail
        if not seen.mail:
            return
        if self._agent is None and self._resumed:
            return  # they wait until the agent is there again
        for letter in await self._take(*URGENT):
            result, error = None, None
            try:
                async with asyncio.timeout(OBEY_S):
                    result = await self._obey(letter)
            except TimeoutError:
                error = f"the agent did not answer within {OBEY_S:g} seconds"
            except (LookupError, AcpError, AgentGoneError) as problem:
                error = str(problem.args[0]) if problem.args else type(problem).__name__
            await self._answer(letter, result=result, error=error)
            self._wake.set()  # there may be more

    async def _obey(self, letter: Letter) -> dict[str, Any]:
        agent = self._agent
        if agent is None:
            raise LookupError("the agent is not ready yet; try again when the run has started")
        if letter.method == "cancel":
            await self._interrupt(agent)
            return {"cancelled": True}
        if letter.method == "permission_response":
            agent.permissions.resolve(letter.params)
            return {"resolved": True}
        if letter.method == "close":
            self._closed = True
            await self._interrupt(agent)
            return {"closed": True}
        options = await agent.set_config_option(letter.params["configId"], letter.params["value"])
        return {"configOptions": options}

    async def _interrupt(self, agent: AgentSession) -> None:
        """End the turn that is on: the agent stops its work on it, or is not told it at all."""
        if self._turn:
            self._cancelled_at = self._cancelled_at or self._loop.time()
            await agent.cancel()
        elif self.turn is not None and self.turn.open:
            self._skipped = True

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
            raise RunFailure("deadline", too_long(self._limits.wall_clock_s))

    def _check_budget(self) -> None:
        if self._agent is not None and (reason := self._agent.over_budget) is not None:
            raise BudgetSpent(reason)

    def _check_drain(self) -> None:
        """A worker that stops lets turns go on for a while only."""
        until = self.parts.drain.until
        if until is not None and not self._ending and self._loop.time() >= until:
            raise Leave

    def _check_waiting(self) -> None:
        """A turn that waits for a person's answer is let go of, as a run that waits for a message is."""
        assert self._agent is not None
        asked = self._agent.permissions
        if asked.waiting and self._loop.time() - asked.opened_at > self._limits.suspend_after_s:
            raise Leave

    async def _check_agent_lives(self) -> None:
        agent = self._agent
        if agent is not None and agent.gone and not self._closed:
            raise await agent.death("The agent's process ended between turns", "agent_crashed")
