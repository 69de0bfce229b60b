"""What clients ask about people and projects (tasks-api §11, §12)."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from litestar import Controller, Request, Response, delete, get, patch, post
from litestar.params import FromPath

from taskyard.accounts import directory, members, present
from taskyard.accounts.caller import Caller, Identity, authenticate, authorize, signed_in
from taskyard.accounts.schemas import Invite, KeyWrite, UserUpdate
from taskyard.errors import NotFoundError
from taskyard.http import answer, body, limit_offset, origin_of, page, path_uuid

Req = Request[Identity, Any, Any]


class MeController(Controller):
    path = "/api"
    guards = (authenticate,)

    @get("/users/@me")
    async def me(self, request: Req) -> Response[bytes]:
        async with request.app.state.database.connection() as connection:
            return answer(await directory.me(connection, request.user))

    @patch("/users/@me", opt={"scope": "task:write"})
    async def update_me(self, request: Req) -> Response[bytes]:
        sent = await body(request, UserUpdate)
        async with request.app.state.database.transaction() as connection:
            return answer(await directory.update_me(connection, request.user, sent))

    @get("/projects")
    async def list_projects(self, request: Req) -> Response[bytes]:
        async with request.app.state.database.connection() as connection:
            rows = await directory.projects(connection, request.user)
        return _cut(request, [present.project(row) for row in rows])

    @get("/organizations")
    async def list_organizations(self, request: Req) -> Response[bytes]:
        async with request.app.state.database.connection() as connection:
            rows = await directory.projects(connection, request.user)
        return _cut(request, present.organizations(rows))

    @get("/organizations/{organization_id:str}")
    async def organization(self, request: Req, organization_id: FromPath[str]) -> Response[bytes]:
        async with request.app.state.database.connection() as connection:
            return answer(await directory.organization(connection, request.user, organization_id))

    @get("/organizations/{organization_id:str}/members")
    async def list_members(self, request: Req, organization_id: FromPath[str]) -> Response[bytes]:
        """Everybody with whom the caller shares a project of it: for those who pick a person in a list."""
        async with request.app.state.database.connection() as connection:
            found = await directory.organization(connection, request.user, organization_id)
            rows = await members.of_organization(connection, request.user, UUID(found["id"]))
        return _cut(request, list(map(present.member, rows)))

    @get("/personal_api_keys/@current")
    async def current_key(self, request: Req) -> Response[bytes]:
        async with request.app.state.database.connection() as connection:
            return answer(await directory.current_key(connection, request.user))

    @get("/code/invites/check-access")
    async def check_access(self, request: Req) -> Response[bytes]:
        """Nothing here needs an invitation (§1.7)."""
        return answer({"has_access": True})

    @post("/code/invites/redeem", status_code=200)
    async def redeem(self, request: Req) -> Response[bytes]:
        """Any code will do, since none is needed."""
        await body(request, Invite)
        return answer({"success": True})


def _cut(request: Req, entries: list[dict[str, Any]]) -> Response[bytes]:
    limit, offset = limit_offset(request)
    part = entries[offset : offset + limit]
    return page(request, origin_of(request), part, len(entries), limit, offset)


class KeyController(Controller):
    """Personal API keys, managed by their owner in a browser."""

    path = "/api/personal_api_keys"
    guards = (signed_in,)

    @get()
    async def list_keys(self, request: Req) -> Response[bytes]:
        async with request.app.state.database.connection() as connection:
            return answer(await directory.keys(connection, request.user))

    @post()
    async def create(self, request: Req) -> Response[bytes]:
        sent = await body(request, KeyWrite)
        async with request.app.state.database.transaction() as connection:
            made = await directory.create_key(connection, request.user, sent)
        return answer(made, 201)

    @get("/{key_id:str}")
    async def retrieve(self, request: Req, key_id: FromPath[str]) -> Response[bytes]:
        async with request.app.state.database.connection() as connection:
            return answer(await directory.key(connection, request.user, path_uuid(key_id)))

    @delete("/{key_id:str}", status_code=204)
    async def revoke(self, request: Req, key_id: FromPath[str]) -> None:
        async with request.app.state.database.transaction() as connection:
            await directory.revoke_key(connection, request.user, path_uuid(key_id))


class ProjectController(Controller):
    path = "/api/projects/{project_id:str}"
    guards = (authorize,)

    @get()
    async def project(self, request: Request[Caller, Any, Any]) -> Response[bytes]:
        caller = request.user
        async with request.app.state.database.connection() as connection:
            row = await directory.project(connection, caller)
        return answer(present.project(row))


class IntegrationController(Controller):
    """The lists that repository pickers read; no integration exists yet (§12)."""

    path = "/api/environments/{project_id:str}/integrations"
    guards = (authorize,)

    @get()
    async def integrations(self, request: Request[Caller, Any, Any]) -> Response[bytes]:
        limit, offset = limit_offset(request)
        return page(request, origin_of(request), [], 0, limit, offset)

    @get(
        [
            "/{integration_id:str}",
            "/{integration_id:str}/github_repos",
            "/{integration_id:str}/github_branches",
        ]
    )
    async def integration(self, integration_id: FromPath[str]) -> Response[bytes]:
        raise NotFoundError
