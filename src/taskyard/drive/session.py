"""The agent of one run: its process in the sandbox, its gateway, its session."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from taskyard.agents.acp import (
    AcpConnection,
    AcpError,
    AgentGoneError,
    PromptResult,
    Session,
)
from taskyard.agents.adapters import (
    Adapter,
)
from taskyard.drive.failures import LIMITS, AgentLost, ErrorType, RunFailure, with_tail
from taskyard.drive.permissions import Permissions
from taskyard.drive.transcript import Transcript
from taskyard.gateway.server import Gateway, Usage
from taskyard.sandbox.provider import Process

Json = dict[str, Any]

CLOSE_SESSION_S = 2.0
CUT_OFF = (
    "The worker did not reach the database for so long that another one may have gone on with the run; so the agent"
    " was stopped."
)
EXIT_S = 10.0
"""An agent whose output has ended has this long to end itself."""


class AgentSession:
    """A started agent with an open session."""

    def __init__(
        self,
        adapter: Adapter,
        process: Process,
        connection: AcpConnection,
        gateway: Gateway,
        transcript: Transcript,
        permissions: Permissions,
    ) -> None:
        self.adapter = adapter
        self._process = process
        self.connection = connection
        self._gateway = gateway
        self._transcript = transcript
        self._closed = False
        self.permissions = permissions
        self.session = Session("")
        self.loaded = False
        """An earlier session goes on: the agent knows what was said in it."""
        self.prompted = False
        """It was told something since its process started."""
        self.takes_tools = False
        """It was offered the tools of the server's own."""
        self.version = ""
        self.prompted_at = asyncio.get_running_loop().time()
        self.gone = False
        self.was_cut_off = False
        self._watch = asyncio.create_task(self._watch_end(), name="agent end")

    @property
    def session_id(self) -> str:
        return self.session.id

    @property
    def usage(self) -> Usage:
        """Model traffic of the run so far, as the gateway counted it."""
        return self._gateway.usage

    @property
    def over_budget(self) -> str | None:
        """Why the run may make no more model calls, as a sentence; None while it may."""
        return self._gateway.over_budget

    @property
    def last_message_at(self) -> float:
        return self.connection.last_message_at

    @property
    def last_message(self) -> str:
        """The text of the newest whole message of this turn."""
        return self._transcript.last_message

    async def prompt(self, blocks: Sequence[Json]) -> PromptResult:
        """One turn. Raises AgentGoneError also when the agent was cut off: what it says then is not its answer."""
        self.prompted_at = asyncio.get_running_loop().time()
        self._transcript.begin_turn()
        self.prompted = True
        try:
            result = await self.connection.prompt(self.session_id, blocks)
        except AcpError as error:
            if self.was_cut_off:
                raise AgentGoneError from error
            raise
        finally:
            self._transcript.end_text()
        if self.was_cut_off:
            raise AgentGoneError
        return result

    async def cancel(self) -> None:
        with suppress(AgentGoneError):
            await self.connection.cancel(self.session_id)

    async def set_config_option(self, config_id: str, value: str) -> Sequence[Json]:
        """Set one of the session's options; `mode` also works for agents that list modes only."""
        known = any(option.get("id") == config_id for option in self.session.config_options)
        if config_id == "mode" and not known:
            await self.connection.set_mode(self.session_id, value)
            return self.session.config_options
        return await self.connection.set_config_option(self.session_id, config_id, value)

    def stderr_tail(self) -> str:
        return self._process.stderr_tail()

    def epitaph(self, message: str) -> str:
        return with_tail(message + ".", self._process.stderr_tail())

    async def death(self, message: str, error_type: ErrorType) -> AgentLost | RunFailure:
        """What the end of the process means for the run: its exit code, and the end of its standard error, are told.

        error_type: of a process that ended by itself.
        """
        if self.was_cut_off:
            return AgentLost(CUT_OFF, counts=False)
        try:
            async with asyncio.timeout(EXIT_S):
                end = await self._process.wait()
        except TimeoutError:
            return RunFailure(
                error_type, self.epitaph(f"{message}: it closed its output but goes on running")
            )
        if end.reason in LIMITS:
            failure, why = LIMITS[end.reason]
            return RunFailure(failure, with_tail(f"{message}: {why}.", end.stderr_tail))
        killed = end.reason == "killed"
        reason = f"killed, exit code {end.code}" if killed else f"exit code {end.code}"
        text = with_tail(f"{message} ({reason}).", end.stderr_tail)
        return AgentLost(text) if killed else RunFailure(error_type, text)

    async def close(self, *, in_turn: bool = False) -> None:
        """End the agent and everything it started. Idempotent.

        in_turn: what it is doing goes on with another process, so it is not told to stop: it would remember that.
        """
        if self._closed:
            return
        self._closed = True
        self._transcript.end_text()
        self._watch.cancel()
        if in_turn:
            await self._process.kill()
        elif self.session_id and not self.gone:
            # Some agents' commands survive a cancel and end with the session.
            with suppress(TimeoutError, AcpError, AgentGoneError):
                async with asyncio.timeout(CLOSE_SESSION_S):
                    await self.connection.close_session(self.session_id)
        await self.connection.close()
        self._transcript.end_text()  # what it said until its session was closed
        await self._process.terminate(self.adapter.exit_grace_s)
        await self._gateway.close()

    async def cut_off(self) -> None:
        """End it, and its way to models and repositories at once, however long its own end takes."""
        self.was_cut_off = self.gone = True
        await asyncio.gather(self.close(in_turn=True), self._gateway.close())

    async def _watch_end(self) -> None:
        await self.connection.wait_ended()
        self.gone = True
