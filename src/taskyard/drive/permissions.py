"""Permission requests of an agent: answered here, or by a person (run-lifecycle §6.5)."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from taskyard.agents.acp import METHOD_NOT_FOUND, AcpError
from taskyard.agents.adapters import auto_answer
from taskyard.drive.recorder import Recorder
from taskyard.events import entries
from taskyard.events.entries import Shown

Json = dict[str, Any]

ASKING_MODES = frozenset({"default", "auto", "read-only"})
"""Modes in which a person is asked, if there is one."""


class Permissions:
    """`answer` serves the agent's requests; `resolve` takes a person's answers.

    `attended` says whether somebody is there to ask: an interactive run has a person, a background run
    has none and allows. Approving a plan is always a person's business.
    """

    def __init__(self, recorder: Recorder, *, mode: str, attended: bool) -> None:
        self._recorder = recorder
        self._ask = attended and mode in ASKING_MODES
        self._open: dict[str, tuple[Json, asyncio.Future[str]]] = {}
        self.answered_at = 0.0
        """Loop time of the last answer of a person; the agent was not silent before it."""

    @property
    def waiting(self) -> bool:
        """Whether a person's answer is awaited; the agent's silence is then no fault."""
        return bool(self._open)

    async def answer(self, method: str, params: Json) -> Json:
        """Serve one request of the agent."""
        if method != "session/request_permission":
            raise AcpError(METHOD_NOT_FOUND, f"This client does not offer {method}")
        options = [option for option in params.get("options") or [] if isinstance(option, dict)]
        tool_call = params.get("toolCall")
        tool_call = tool_call if isinstance(tool_call, dict) else {}
        plan = tool_call.get("kind") == "switch_mode"
        if self._ask or plan:
            chosen: str | None = await self._ask_person(options, tool_call)
        else:
            chosen = auto_answer(options, ("allow_once", "allow_always"))
        if chosen is None:
            return {"outcome": {"outcome": "cancelled"}}
        return {"outcome": {"outcome": "selected", "optionId": chosen}}

    async def _ask_person(self, options: list[Json], tool_call: Json) -> str:
        request_id = uuid.uuid4().hex
        request = {"requestId": request_id, "options": options, "toolCall": tool_call}
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._open[request_id] = (request, future)
        self._recorder.add(
            entries.raw({"type": "permission_request", **request}, Shown.STREAM),
            entries.named(
                "_posthog/permission_request", {"toolCallId": tool_call.get("toolCallId"), **request}
            ),
        )
        try:
            return await future
        finally:
            del self._open[request_id]
            self.answered_at = asyncio.get_running_loop().time()

    def resolve(self, params: Json) -> None:
        """A person's answer. Raises LookupError with a clear text when it fits no open request."""
        for request_id, (request, future) in self._open.items():
            tool_call_id = request["toolCall"].get("toolCallId")
            if params.get("requestId") != request_id and params.get("toolCallId", "") != tool_call_id:
                continue
            known = [option.get("optionId") for option in request["options"]]
            if params["optionId"] not in known:
                raise LookupError(f"unknown optionId '{params['optionId']}'; the request offers {known}")
            if not future.done():
                future.set_result(params["optionId"])
                self._recorder.add(
                    entries.named(
                        "_posthog/permission_resolved",
                        {"requestId": request_id, "toolCallId": tool_call_id, "optionId": params["optionId"]},
                    )
                )
            return
        raise LookupError("no such permission request is open: it was answered, or its turn has ended")
