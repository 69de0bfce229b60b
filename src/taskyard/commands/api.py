"""`POST R/command/`: JSON-RPC to the agent of a run (tasks-api §6.6)."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, post
from litestar.params import FromPath

from taskyard.accounts.caller import Caller, authorize
from taskyard.commands import service
from taskyard.commands.schemas import Command
from taskyard.http import answer, body, path_uuid


class CommandController(Controller):
    path = "/api/projects/{project_id:str}/tasks/{task_id:str}/runs/{run_id:str}/command"
    guards = (authorize,)

    @post()
    async def send(
        self, request: Request[Caller, Any, Any], task_id: FromPath[str], run_id: FromPath[str]
    ) -> Response[bytes]:
        sent = await body(request, Command)
        state = request.app.state
        reply = await service.send(
            state.database, state.hub, request.user, path_uuid(task_id), path_uuid(run_id), sent
        )
        return answer(reply)
