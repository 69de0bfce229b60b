"""Putting a command into a run's mailbox, and waiting for the agent's answer."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from taskyard.accounts.caller import Caller
from taskyard.commands import store
from taskyard.commands.schemas import Command, Method, check_params
from taskyard.db.engine import Database
from taskyard.db.hub import RUNS, Hub
from taskyard.errors import InvalidInputError, NotFoundError, TaskyardError
from taskyard.runs import store as runs

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


async def send(
    database: Database, hub: Hub, caller: Caller, task_id: UUID, run_id: UUID, command: Command
) -> dict[str, Any]:
    """The JSON-RPC answer to a command (tasks-api §6.6).

    A message is queued and answered at once; everything else is answered by the driver.
    """
    params = check_params(command)
    with hub.subscribe(f"{RUNS}{run_id}") as wake:
        async with database.transaction() as connection:
            row = await runs.lock(connection, run_id)
            if row is None or row["task_id"] != task_id or row["project_id"] != caller.project.id:
                raise NotFoundError
            if unknown := params.get("artifact_ids"):
                raise InvalidInputError(
                    body={
                        "error": "Some artifact_ids are invalid for this run",
                        "missing_artifact_ids": unknown,
                    }
                )
            live = row["environment"] == "cloud" and row["started_at"] is not None
            if not live or row["status"] not in ("queued", "in_progress"):
                raise NoActiveSandboxError
            seq = await store.insert(connection, run_id, caller.user_id, command.method, params)
        answer: dict[str, Any] = {"jsonrpc": "2.0"}
        if command.id is not None:
            answer["id"] = command.id
        if command.method == Method.USER_MESSAGE:
            return answer | {"result": {"queued": True}}
        reply = await _wait(database, run_id, seq, wake)
    if reply["error"] is not None:
        return answer | {"error": {"code": -32000, "message": reply["error"]}}
    return answer | {"result": reply["result"]}


async def _wait(database: Database, run_id: UUID, seq: int, wake: Any) -> dict[str, Any]:
    try:
        async with asyncio.timeout(ANSWER_S):
            while (reply := await store.answered(database, run_id, seq)) is None:
                await wake.wait(5.0)
            return reply
    except TimeoutError:
        raise AgentTimeoutError from None
