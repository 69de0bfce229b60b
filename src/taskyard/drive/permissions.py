"""Permission requests of an agent: answered here, or by a person (run-lifecycle §6.5)."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from taskyard.agents.acp import METHOD_NOT_FOUND, AcpError
from taskyard.agents.options import auto_answer
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

    `asked` are requests that were open when the agent was stopped. The agent asks again when it goes on; a person
    may answer the old request, before or after that: the answer is given to the one that asks the same.
    """

    def __init__(self, recorder: Recorder, *, mode: str, attended: bool, asked: Sequence[Json] = ()) -> None:
        self._recorder = recorder
        self._ask = attended and mode in ASKING_MODES
        self._open: dict[str, tuple[Json, asyncio.Future[str]]] = {}
        self._asked = list(asked)
        self._decided: list[tuple[Json, str]] = []
        self.opened_at = 0.0
        """Loop time of the newest request that a person was asked."""
        self.answered_at = 0.0
        """Loop time of the last answer of a person; the agent was not silent before it."""

    @property
    def waiting(self) -> bool:
        """Whether a person's answer is awaited; the agent's silence is then no fault."""
        return bool(self._open)

    @property
    def requests(self) -> list[Json]:
        """The requests that wait for a person's answer."""
        return [*(request for request, _ in self._open.values()), *self._asked]

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
        for decided in self._decided:
            if _same(decided[0], request):
                self._decided.remove(decided)
                return decided[1]
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._open[request_id] = (request, future)
        self.opened_at = asyncio.get_running_loop().time()
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

    def forget(self) -> None:
        """The turn has ended: nothing of it is asked any more."""
        self._asked.clear()
        self._decided.clear()

    def resolve(self, params: Json) -> None:
        """A person's answer. Raises LookupError with a clear text when it fits no open request."""
        old = next((request for request in self._asked if _is_meant(request, params)), None)
        for request, future in self._open.values():
            if (old is not None and _same(old, request)) or _is_meant(request, params):
                if future.done():
                    raise LookupError("this permission request was answered already")
                self._settle(request, params["optionId"])
                future.set_result(params["optionId"])
                break
        else:
            if old is None:
                raise LookupError(
                    "no such permission request is open: it was answered, or its turn has ended"
                )
            self._settle(old, params["optionId"])
            self._decided.append((old, params["optionId"]))
        if old is not None:
            self._asked.remove(old)

    def _settle(self, request: Json, option_id: str) -> None:
        known = [option.get("optionId") for option in request["options"]]
        if option_id not in known:
            raise LookupError(f"unknown optionId '{option_id}'; the request offers {known}")
        resolved = {
            "requestId": request["requestId"],
            "toolCallId": request["toolCall"].get("toolCallId"),
            "optionId": option_id,
        }
        self._recorder.add(entries.named("_posthog/permission_resolved", resolved))


def _is_meant(request: Json, params: Json) -> bool:
    """Whether a person's answer names this request, or its tool call."""
    named: Any = params.get("requestId"), params.get("toolCallId", "")
    return named[0] == request["requestId"] or bool(named[1] == request["toolCall"].get("toolCallId"))


def _same(one: Json, other: Json) -> bool:
    """Whether two requests ask the same: an agent that goes on gives its tool calls new ids."""

    def asks(request: Json) -> Any:
        call = request["toolCall"]
        return [call.get("title"), call.get("kind"), call.get("rawInput"), request["options"]]

    return bool(asks(one) == asks(other))
