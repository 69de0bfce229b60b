"""`repositories/`: an addition of ours, so that tasks can work on any git repository."""

from __future__ import annotations

from typing import Annotated, Any

from litestar import Controller, Request, Response, post
from pydantic import AfterValidator, StringConstraints

from taskyard.accounts.caller import Caller, authorize
from taskyard.forge import service
from taskyard.http import answer, body
from taskyard.schemas import Body, Filled, NotNull, Title, repository_name

Req = Request[Caller, Any, Any]


class Register(Body):
    origin: Annotated[Filled, StringConstraints(max_length=2000)]
    name: Annotated[Title | None, AfterValidator(repository_name), NotNull] = None


class RepositoryController(Controller):
    path = "/api/projects/{project_id:str}/repositories"
    guards = (authorize,)

    @post()
    async def register(self, request: Req) -> Response[bytes]:
        """Register a repository: 201 when its name is new, 200 otherwise."""
        sent = await body(request, Register)
        async with request.app.state.database.transaction() as connection:
            entry, new = await service.register(
                connection, request.user, request.app.state.settings.data_dir, sent.origin, sent.name
            )
        return answer(entry, 201 if new else 200)
