"""Sandbox environment endpoints (tasks-api §9)."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, delete, get, patch, post
from litestar.params import FromPath

from taskyard.accounts.caller import Caller, authorize
from taskyard.db.engine import Row
from taskyard.environments import present, service, store
from taskyard.environments.domains import trusted
from taskyard.environments.schemas import EnvironmentCreate, EnvironmentUpdate
from taskyard.http import answer, body, limit_offset, origin_of, page, path_uuid

Req = Request[Caller, Any, Any]


class EnvironmentController(Controller):
    path = "/api/projects/{project_id:str}/sandbox_environments"
    guards = (authorize,)

    @get()
    async def list_environments(self, request: Req) -> Response[bytes]:
        limit, offset = limit_offset(request)
        caller = request.user
        rows, count = await store.page(
            request.app.state.database, caller.project.id, caller.user_id, limit, offset
        )
        return page(request, origin_of(request), [present.item(row) for row in rows], count, limit, offset)

    @post()
    async def create(self, request: Req) -> Response[bytes]:
        sent = await body(request, EnvironmentCreate)
        state = request.app.state
        async with state.database.transaction() as connection:
            row = await service.create(connection, request.user, state.settings, sent)
        return shown(request, row, 201)

    @get("/{environment_id:str}")
    async def retrieve(self, request: Req, environment_id: FromPath[str]) -> Response[bytes]:
        row = await service.find(request.app.state.database, request.user, path_uuid(environment_id))
        return shown(request, row)

    @patch("/{environment_id:str}")
    async def update(self, request: Req, environment_id: FromPath[str]) -> Response[bytes]:
        sent = await body(request, EnvironmentUpdate)
        state = request.app.state
        async with state.database.transaction() as connection:
            row = await service.update(
                connection, request.user, state.settings, path_uuid(environment_id), sent
            )
        return shown(request, row)

    @delete("/{environment_id:str}", status_code=204)
    async def delete(self, request: Req, environment_id: FromPath[str]) -> None:
        async with request.app.state.database.transaction() as connection:
            await service.delete(connection, request.user, path_uuid(environment_id))


def shown(request: Req, row: Row, status: int = 200) -> Response[bytes]:
    return answer(present.environment(row, trusted(request.app.state.settings)), status)
