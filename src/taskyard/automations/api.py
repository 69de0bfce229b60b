"""Automation endpoints (tasks-api §10)."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, delete, get, patch, post, put
from litestar.params import FromPath

from taskyard.accounts.caller import Caller, authorize
from taskyard.automations import present, service, store
from taskyard.automations.schemas import AutomationUpdate, AutomationWrite, NoBody
from taskyard.http import answer, body, limit_offset, origin_of, page, path_uuid

Req = Request[Caller, Any, Any]


class AutomationController(Controller):
    path = "/api/projects/{project_id:str}/task_automations"
    guards = (authorize,)

    @get()
    async def list_automations(self, request: Req) -> Response[bytes]:
        limit, offset = limit_offset(request)
        rows, count = await store.page(request.app.state.database, request.user, limit, offset)
        results = [present.automation(row) for row in rows]
        return page(request, origin_of(request), results, count, limit, offset)

    @post()
    async def create(self, request: Req) -> Response[bytes]:
        sent = await body(request, AutomationWrite)
        async with request.app.state.database.transaction() as connection:
            row = await service.create(connection, request.user, sent)
        return answer(present.automation(row), 201)

    @get("/{automation_id:str}")
    async def retrieve(self, request: Req, automation_id: FromPath[str]) -> Response[bytes]:
        row = await service.find(request.app.state.database, request.user, path_uuid(automation_id))
        return answer(present.automation(row))

    @patch("/{automation_id:str}")
    async def update(self, request: Req, automation_id: FromPath[str]) -> Response[bytes]:
        return await self._update(request, automation_id, await body(request, AutomationUpdate))

    @put("/{automation_id:str}")
    async def replace(self, request: Req, automation_id: FromPath[str]) -> Response[bytes]:
        """An update in which the required fields have to be there."""
        return await self._update(request, automation_id, await body(request, AutomationWrite))

    async def _update(self, request: Req, automation_id: str, sent: AutomationUpdate) -> Response[bytes]:
        async with request.app.state.database.transaction() as connection:
            row = await service.update(connection, request.user, path_uuid(automation_id), sent)
        return answer(present.automation(row))

    @delete("/{automation_id:str}", status_code=204)
    async def delete(self, request: Req, automation_id: FromPath[str]) -> None:
        async with request.app.state.database.transaction() as connection:
            await service.delete(connection, request.user, path_uuid(automation_id))

    @post("/{automation_id:str}/run")
    async def run(self, request: Req, automation_id: FromPath[str]) -> Response[bytes]:
        """Start one run now: 200 with the automation."""
        await body(request, NoBody)
        state = request.app.state
        async with state.database.transaction() as connection:
            row = await service.run_now(connection, request.user, path_uuid(automation_id), state.agents)
        return answer(present.automation(row))
