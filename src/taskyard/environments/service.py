"""Rules of sandbox environments: who may use one, and what of it reaches an agent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from taskyard.accounts.caller import Caller
from taskyard.db.engine import Connection, Database, Row
from taskyard.environments import store
from taskyard.environments.schemas import EnvironmentCreate, EnvironmentUpdate
from taskyard.environments.secrets import opened, sealing_box
from taskyard.errors import InvalidInputError, NotFoundError
from taskyard.settings import Settings

RESERVED = re.compile(
    # Names of the server's own, also where it sets none: an agent must not take a person's text for them.
    r"POSTHOG_(API_URL|PERSONAL_API_KEY|PROJECT_ID|TASK_ID|TASK_RUN_ID|RESUME_RUN_ID|SANDBOX_ID|CODE_.*)"
    r"|POSTHOG_TASK_RUN_EVENT_INGEST_.*|JWT_PUBLIC_KEY|GITHUB_TOKEN|GH_TOKEN|LLM_GATEWAY_URL"
    # What the sandbox stands on.
    r"|PATH|HOME|USER|SHELL|TMPDIR|PWD"
    # What makes programs load or run other code (run-lifecycle §5.1).
    r"|(LD_|DYLD_|GIT_).*|NODE_OPTIONS|BASH_ENV|PROMPT_COMMAND|PYTHONSTARTUP|PERL5OPT|RUBYOPT"
)


async def create(connection: Connection, caller: Caller, settings: Settings, body: EnvironmentCreate) -> Row:
    """A new environment of the caller's project, as stored (tasks-api §9)."""
    _check_image(settings, body)
    fields = {name: getattr(body, name) for name in store.COLUMNS if name != "variables"}
    fields["mcp_servers"] = _servers(body)
    fields["variables"] = await _sealed(connection, settings, body.environment_variables)
    environment_id = await store.insert(connection, caller.project.id, caller.user_id, fields)
    return await find(connection, caller, environment_id)


async def update(
    connection: Connection, caller: Caller, settings: Settings, environment_id: UUID, body: EnvironmentUpdate
) -> Row:
    """Only the sent fields change; sent variables replace the whole map."""
    _check_image(settings, body)
    before = await find(connection, caller, environment_id)
    changes: dict[str, Any] = body.sent()
    if "mcp_servers" in changes:
        changes["mcp_servers"] = _servers(body)
    if (variables := changes.pop("environment_variables", None)) is not None:
        changes["variables"] = await _sealed(connection, settings, variables)
    if not await store.update(connection, caller.project.id, caller.user_id, environment_id, changes):
        raise NotFoundError
    # Somebody else's public environment may just have become private: its new state is still the answer.
    row = await store.get(connection, caller.project.id, before["user_id"], environment_id)
    if row is None:
        raise NotFoundError
    return row


def _check_image(settings: Settings, body: EnvironmentUpdate) -> None:
    if (problem := settings.sandbox.image_problem(body.image)) is not None:
        raise InvalidInputError(problem, attr="image")


def _servers(body: EnvironmentUpdate) -> Jsonb:
    return Jsonb([server.stored() for server in body.mcp_servers])


async def delete(connection: Connection, caller: Caller, environment_id: UUID) -> None:
    if not await store.delete(connection, caller.project.id, caller.user_id, environment_id):
        raise NotFoundError


async def find(source: Database | Connection, caller: Caller, environment_id: UUID) -> Row:
    """The environment, or NotFoundError."""
    row = await store.get(source, caller.project.id, caller.user_id, environment_id)
    if row is None:
        raise NotFoundError
    return row


async def accessible(
    source: Database | Connection, project_id: int, environment_id: UUID, task_creator_id: int | None
) -> Row | None:
    """The environment, if runs of that person's tasks may use it (tasks-api §4.8.2 step 6).

    A task without a creator may use public ones only.
    """
    return await store.get(source, project_id, task_creator_id, environment_id)


async def variables_for(database: Database, settings: Settings, environment_id: UUID) -> dict[str, str]:
    """The environment's variables, decrypted, without reserved names. Ask `accessible` first.

    Raises SecretKeyError when this machine cannot decrypt them.
    """
    text = await opened(settings, lambda: store.variables(database, environment_id))
    variables: dict[str, str] = {} if text is None else json.loads(text)
    return {name: value for name, value in variables.items() if not RESERVED.fullmatch(name)}


async def _sealed(connection: Connection, settings: Settings, variables: Mapping[str, str]) -> bytes | None:
    if not variables:
        return None
    box = await sealing_box(connection, settings)
    return box.seal(json.dumps(variables))
