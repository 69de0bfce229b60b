"""Endpoints of who belongs to a project or an organization."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from litestar import Controller, Request, Response, delete, get, patch, post
from litestar.params import FromPath

from taskyard.accounts import members, present, store
from taskyard.accounts.caller import Caller, authorize
from taskyard.accounts.schemas import MemberAdd, MemberUpdate
from taskyard.db.engine import Connection
from taskyard.http import answer, body, limit_offset, origin_of, page, path_uuid

Req = Request[Caller, Any, Any]
MANAGE = {"scope": "*"}
"""No key that was made for tasks lets people in."""


class MemberController(Controller):
    path = "/api/projects/{project_id:str}/members"
    guards = (authorize,)

    @get()
    async def list_members(self, request: Req) -> Response[bytes]:
        limit, offset = limit_offset(request)
        async with request.app.state.database.connection() as connection:
            rows, count = await members.page(connection, request.user, limit, offset)
        return page(request, origin_of(request), list(map(present.member, rows)), count, limit, offset)

    @post(opt=MANAGE)
    async def add(self, request: Req) -> Response[bytes]:
        sent = await body(request, MemberAdd)
        async with request.app.state.database.transaction() as connection:
            made = await members.add(connection, request.user, sent)
        return answer(made, 201)

    @get("/{member:str}")
    async def retrieve(self, request: Req, member: FromPath[str]) -> Response[bytes]:
        async with request.app.state.database.connection() as connection:
            wanted = await _wanted(connection, request, member)
            return answer(present.member(await members.find(connection, request.user, wanted)))

    @patch("/{member:str}", opt=MANAGE)
    async def update(self, request: Req, member: FromPath[str]) -> Response[bytes]:
        sent = await body(request, MemberUpdate)
        async with request.app.state.database.transaction() as connection:
            wanted = await _wanted(connection, request, member)
            row = await members.change_role(connection, request.user, wanted, sent.role)
        return answer(present.member(row))

    @delete("/{member:str}", status_code=204, opt=MANAGE)
    async def remove(self, request: Req, member: FromPath[str]) -> None:
        async with request.app.state.database.transaction() as connection:
            await members.remove(connection, request.user, await _wanted(connection, request, member))


async def _wanted(connection: Connection, request: Req, member: str) -> UUID:
    """A user's uuid out of the path; `@me` is the caller's."""
    if member != "@me":
        return path_uuid(member)
    user = await store.user_by_id(connection, request.user.user_id)
    return UUID(str(user["uuid"]))
