"""Putting a command into a run's mailbox, and waiting for the agent's answer."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from taskyard.accounts.caller import Caller
from taskyard.artifacts import service as artifacts
from taskyard.commands import store
from taskyard.commands.schemas import MESSAGES, Command, Method, check_params
from taskyard.db.engine import Database, Row
from taskyard.db.hub import RUNS, Hub
from taskyard.errors import InvalidInputError, TaskyardError
from taskyard.jobs import enqueue_drive
from taskyard.runs import resume
from taskyard.runs import service as runs

ANSWER_S = 30.0
"""How long a command other than a message is waited for; the agent answers these at once or not at all."""


class NoActiveSandboxError(InvalidInputError):
    """No active sandbox for this task run"""

    def __init__(self) -> None:
        super().__init__(body={"error": "No active sandbox for this task run"})


class AgentTimeoutError(TaskyardError):
    """Agent server request timed out"""

    status = 504

    def __init__(self) -> None:
        super().__init__(body={"error": "Agent server request timed out"})


class AgentGoneError(TaskyardError):
    """Agent server is not reachable"""

    status = 502

    def __init__(self) -> None:
        super().__init__(body={"error": "Agent server is not reachable"})


async def send(
    database: Database, hub: Hub, caller: Caller, task_id: UUID, run_id: UUID, command: Command
) -> dict[str, Any]:
    """The JSON-RPC answer to a command (tasks-api §6.6).

    A message is queued and answered at once; everything else is answered by the driver.
    """
    params = check_params(command)
    with hub.subscribe(f"{RUNS}{run_id}") as wake:
        async with database.transaction() as connection:
            row = await runs.locked(connection, caller, task_id, run_id)
            if command.method in MESSAGES and (ids := params.pop("artifact_ids")):
                params["artifacts"] = _artifacts(row, ids)
            waits = row["status"] == "queued"  # no worker has had it yet: a message is for the beginning
            if row["started_at"] is None or (waits and command.method not in MESSAGES):
                raise NoActiveSandboxError
            method: str = command.method
            if method == Method.STEER:
                # It comes before the messages that wait, and ends the turn that would keep it waiting.
                await store.insert(
                    connection, run_id, caller.user_id, Method.USER_MESSAGE, params | {"steer": True}
                )
                method, params = Method.CANCEL, {}
            seq = await store.insert(connection, run_id, caller.user_id, method, params)
            if await resume.wake(connection, run_id, message=method == Method.USER_MESSAGE):
                await enqueue_drive(connection, run_id)
        answer: dict[str, Any] = {"jsonrpc": "2.0"}
        if command.id is not None:
            answer["id"] = command.id
        if command.method in MESSAGES:
            return answer | {"result": {"queued": True}}
        reply = await _wait(database, run_id, seq, wake)
    if reply["error"] is not None:
        return answer | {"error": {"code": -32000, "message": reply["error"]}}
    return answer | {"result": reply["result"]}


def _artifacts(row: Row, ids: list[str]) -> list[dict[str, Any]]:
    """The run's manifest entries with these ids; refused when one is unknown."""
    found, missing = artifacts.entries_of(row, list(dict.fromkeys(ids)))
    if missing:
        error = "Some artifact_ids are invalid for this run"
        raise InvalidInputError(body={"error": error, "missing_artifact_ids": missing})
    return found


async def _wait(database: Database, run_id: UUID, seq: int, wake: Any) -> dict[str, Any]:
    try:
        async with asyncio.timeout(ANSWER_S):
            while True:
                driven = await store.is_driven(database, run_id)
                if (reply := await store.answered(database, run_id, seq)) is not None:
                    return reply
                if not driven:
                    raise AgentGoneError
                await wake.wait(5.0)
    except TimeoutError:
        raise AgentTimeoutError from None
