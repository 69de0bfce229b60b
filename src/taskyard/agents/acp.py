"""The client side of ACP, the Agent Client Protocol, version 1, for a server that has no screen.

Messages are plain dicts as they are on the wire, so that the record keeps what the agent said; only what
the server acts on is read, and leniently: unknown update kinds, stop reasons and fields pass through.
The client offers no files and no terminal: agents use their own tools, inside their sandbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from taskyard import __version__
from taskyard.agents.jsonrpc import (
    INTERNAL_ERROR,
    METHOD_NOT_FOUND,
    AcpError,
    AgentGoneError,
    Handler,
    Json,
    JsonRpcConnection,
    Served,
)
from taskyard.errors import TaskyardError

__all__ = [
    "METHOD_NOT_FOUND", "AcpConnection", "AcpError", "AgentGoneError", "Failure", "PromptResult",
    "ProtocolVersionError", "Session",
]  # fmt: skip

PROTOCOL_VERSION = 1
PERMISSION = "session/request_permission"
CANCELLED: Json = {"outcome": {"outcome": "cancelled"}}

# Without it codex-acp 2.6 ends a failed turn with `end_turn` and the error as plain agent text.
FAILURE_OPT_IN: Json = {"jetbrains": {"air": {"version": 1, "capabilities": ["sessionFailure"]}}}


class ProtocolVersionError(TaskyardError):
    """The agent speaks another version of ACP."""

    code = "agent_protocol_version"


@dataclass(frozen=True)
class Session:
    """A session as the agent described it. `modes` are mode ids; `config_options` are ACP's objects."""

    id: str
    modes: tuple[str, ...] = ()
    current_mode: str | None = None
    config_options: tuple[Json, ...] = ()
    raw: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a turn failed that formally ended: `category` is connection, limit, service or the like."""

    category: str
    title: str
    raw: Json


@dataclass(frozen=True)
class PromptResult:
    """How a turn ended. `usage` is the agent's own count; what it covers is `Adapter.usage`."""

    stop_reason: str
    usage: Json | None
    failure: Failure | None
    raw: Json


class AcpConnection:
    """The conversation with one agent process.

    reader, writer: the agent's standard output and input; read from at once, so make it while the event
        loop runs.
    on_update: gets `params` of each session/update, in order, synchronously. A prompt's updates have all
        been handed over when `prompt` returns.
    on_request: answers requests of the agent (session/request_permission); raise
        AcpError(METHOD_NOT_FOUND, …) for what is unknown. May take long; is cancelled by `cancel`.
    on_traffic: every message, raw. on_noise: output lines that are no messages, bounded.
    before_read: awaited before each read; holds the agent back while the consumer is behind.

    Every method raises AcpError (the agent refused), AgentGoneError (its output ended). Deadlines are the
    caller's, with asyncio.timeout; the connection stays usable after one.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        on_update: Callable[[Json], None],
        on_request: Handler,
        on_traffic: Callable[[Literal["in", "out"], Json], None] | None = None,
        on_noise: Callable[[str], None] | None = None,
        before_read: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._on_update = on_update
        self._on_request = on_request
        self._replaying: set[str] = set()
        self._prompts: dict[str, int] = {}
        self._cancelled: set[str] = set()
        self.capabilities: Json = {}
        """`agentCapabilities` of the agent, after `initialize`."""
        self._rpc = JsonRpcConnection(
            reader,
            writer,
            on_notification=self._notified,
            on_request=self._requested,
            on_traffic=on_traffic,
            on_noise=on_noise,
            before_read=before_read,
        )

    @property
    def last_message_at(self) -> float:
        """Loop time of the agent's last message, or of the connection's start."""
        return self._rpc.last_message_at

    async def initialize(self, meta: Mapping[str, Any] | None = None) -> Json:
        """Shake hands; `meta` is added to the client capabilities' `_meta`. Returns the agent's answer."""
        capabilities = {
            "fs": {"readTextFile": False, "writeTextFile": False},
            "terminal": False,
            "_meta": {**FAILURE_OPT_IN, **(meta or {})},
        }
        params = {
            "protocolVersion": PROTOCOL_VERSION,
            "clientCapabilities": capabilities,
            "clientInfo": {"name": "taskyard", "title": "Taskyard", "version": __version__},
        }
        answer = await self._call("initialize", params)
        version = answer.get("protocolVersion")
        if version != PROTOCOL_VERSION:
            raise ProtocolVersionError(
                f"The agent speaks ACP version {version!r}, this server version {PROTOCOL_VERSION}. "
                "Install the agent release that the server names (taskyard agents list)."
            )
        self.capabilities = _dict(answer.get("agentCapabilities"))
        return answer

    def offers(self, name: str) -> bool:
        """Whether the agent advertised a session capability, such as `resume`, `close`, `systemPrompt`."""
        offer = _dict(self.capabilities.get("sessionCapabilities")).get(name)
        return offer is not None and offer is not False

    def takes(self, server: Json) -> bool:
        """Whether the agent takes an MCP server of this kind; every agent takes programs."""
        kind = server.get("type")
        return kind is None or bool(_dict(self.capabilities.get("mcpCapabilities")).get(kind))

    async def new_session(
        self,
        cwd: str,
        mcp_servers: Sequence[Json] = (),
        meta: Mapping[str, Any] | None = None,
        system_prompt_append: str | None = None,
    ) -> Session:
        """Open a session in the absolute path `cwd`.

        system_prompt_append is sent only to an agent that `offers("systemPrompt")`; for others the caller
        puts it into the first prompt.
        """
        params = self._session_params(cwd, mcp_servers, meta, system_prompt_append)
        answer = await self._call("session/new", params)
        session_id = answer.get("sessionId")
        if not isinstance(session_id, str) or not session_id:
            raise AcpError(INTERNAL_ERROR, "session/new was answered without a sessionId", answer)
        return _session(session_id, answer)

    async def load_session(
        self,
        session_id: str,
        cwd: str,
        mcp_servers: Sequence[Json] = (),
        meta: Mapping[str, Any] | None = None,
        system_prompt_append: str | None = None,
    ) -> Session:
        """Open an earlier session, by session/resume if offered, else session/load.

        The history that session/load replays is not given to on_update: the record has it already. Set the
        mode again: Claude keeps it, Codex starts in its first one.
        """
        params = {
            "sessionId": session_id,
            **self._session_params(cwd, mcp_servers, meta, system_prompt_append),
        }
        if self.offers("resume"):
            return _session(session_id, await self._call("session/resume", params))
        if not self.capabilities.get("loadSession"):
            raise AcpError(METHOD_NOT_FOUND, "The agent cannot open earlier sessions")
        self._replaying.add(session_id)

        def replayed() -> None:
            self._replaying.discard(session_id)

        return _session(session_id, await self._call("session/load", params, replayed))

    async def set_mode(self, session_id: str, mode_id: str) -> None:
        await self._call("session/set_mode", {"sessionId": session_id, "modeId": mode_id})

    async def set_config_option(self, session_id: str, config_id: str, value: str | bool) -> tuple[Json, ...]:
        """Set an option; returns all options as they are now (empty if the agent does not say)."""
        params: Json = {"sessionId": session_id, "configId": config_id, "value": value}
        if isinstance(value, bool):
            params["type"] = "boolean"
        answer = await self._call("session/set_config_option", params)
        return _dicts(answer.get("configOptions"))

    async def set_model(self, session_id: str, model_id: str) -> None:
        """The older way to choose a model, for agents that list `models` and no option of that category."""
        await self._call("session/set_model", {"sessionId": session_id, "modelId": model_id})

    async def set_title(self, session_id: str, title: str) -> None:
        """Name the session, where the agent offers that; it then does not pay a model for a title."""
        if self.offers("title"):
            await self._call("session/set_title", {"sessionId": session_id, "title": title})

    async def prompt(self, session_id: str, blocks: Sequence[Json]) -> PromptResult:
        """Run one turn: send content blocks, return when the agent has ended it.

        Prompt one session from one place at a time: what agents do with a second prompt differs.
        """
        self._cancelled.discard(session_id)
        self._prompts[session_id] = self._prompts.get(session_id, 0) + 1

        def ended() -> None:
            self._prompts[session_id] -= 1
            if not self._prompts[session_id]:
                del self._prompts[session_id]
                self._cancelled.discard(session_id)

        params = {"sessionId": session_id, "prompt": list(blocks)}
        answer = await self._call("session/prompt", params, ended)
        usage = answer.get("usage")
        return PromptResult(
            stop_reason=str(answer.get("stopReason") or "unknown"),
            usage=usage if isinstance(usage, dict) else None,
            failure=_failure(answer),
            raw=answer,
        )

    async def cancel(self, session_id: str) -> None:
        """Ask the agent to end the turn; `prompt` then returns with stop reason `cancelled`.

        Permission requests of the session, open ones and those still coming in this turn, are answered
        `cancelled`, as the protocol requires.
        """
        if session_id in self._prompts:
            self._cancelled.add(session_id)
        try:
            await self._rpc.notify("session/cancel", {"sessionId": session_id})
        finally:
            for request in [one for one in self._rpc.served if _is_permission(one, session_id)]:
                self._rpc.answer_early(request, CANCELLED)

    async def close_session(self, session_id: str) -> None:
        """Close the session where the agent offers that; ends commands which survive a cancel."""
        if self.offers("close"):
            await self._call("session/close", {"sessionId": session_id})

    async def wait_ended(self) -> None:
        """Return when the agent's output has ended (or `close` was called)."""
        await self._rpc.wait_ended()

    async def close(self) -> None:
        """End the connection and close the agent's input, which ends most agents. Idempotent."""
        await self._rpc.close()

    async def _call(self, method: str, params: Json, on_answer: Callable[[], None] | None = None) -> Json:
        answer = await self._rpc.request(method, params, on_answer)
        if answer is None:
            return {}
        if not isinstance(answer, dict):
            raise AcpError(INTERNAL_ERROR, f"{method} was answered with something that is no object", answer)
        return answer

    def _session_params(
        self,
        cwd: str,
        mcp_servers: Sequence[Json],
        meta: Mapping[str, Any] | None,
        system_prompt_append: str | None,
    ) -> Json:
        params: Json = {"cwd": cwd, "mcpServers": list(mcp_servers)}
        if meta:
            params["_meta"] = dict(meta)
        if system_prompt_append and self.offers("systemPrompt"):
            content = [{"type": "text", "text": system_prompt_append}]
            params["systemPrompt"] = {"mode": "append", "content": content}
        return params

    def _notified(self, method: str, params: Json) -> None:
        if method == "session/update" and _session_id(params) not in self._replaying:
            self._on_update(params)

    async def _requested(self, method: str, params: Json) -> Json:
        if method == PERMISSION and _session_id(params) in self._cancelled:
            return CANCELLED
        return await self._on_request(method, params)


def _is_permission(request: Served, session_id: str) -> bool:
    return request.method == PERMISSION and request.params.get("sessionId") == session_id


def _session_id(params: Json) -> str:
    session_id = params.get("sessionId")
    return session_id if isinstance(session_id, str) else ""


def _failure(answer: Json) -> Failure | None:
    air = _dict(_dict(_dict(answer.get("_meta")).get("jetbrains")).get("air"))
    failure = air.get("sessionFailure")
    if not isinstance(failure, dict) or failure.get("severity") == "warning":
        return None
    return Failure(
        category=str(failure.get("category") or "unknown"),
        title=str(failure.get("title") or "The turn failed; the agent gave no reason."),
        raw=failure,
    )


def _session(session_id: str, answer: Json) -> Session:
    modes = _dict(answer.get("modes"))
    current = modes.get("currentModeId")
    return Session(
        id=session_id,
        modes=tuple(
            mode["id"] for mode in _dicts(modes.get("availableModes")) if isinstance(mode.get("id"), str)
        ),
        current_mode=current if isinstance(current, str) else None,
        config_options=_dicts(answer.get("configOptions")),
        raw=answer,
    )


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> tuple[Json, ...]:
    return tuple(item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()
