"""Rules of memberships: who may let people into a project, change their role, and take them out."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from taskyard.accounts import members_store as store
from taskyard.accounts import present, sign_in
from taskyard.accounts import store as accounts
from taskyard.accounts.caller import Caller, Identity
from taskyard.accounts.schemas import MemberAdd
from taskyard.db.engine import Connection, Row
from taskyard.errors import InvalidInputError, NotFoundError, PermissionDeniedError


class NotAdminError(PermissionDeniedError):
    """Only admins of the project may do this."""


class LastAdminError(InvalidInputError):
    """The project would have no admin any more: make somebody else an admin first."""

    code = "last_admin"


async def page(connection: Connection, caller: Caller, limit: int, offset: int) -> tuple[list[Row], int]:
    return await store.page(connection, caller.project.id, limit, offset)


async def of_organization(connection: Connection, identity: Identity, organization_id: UUID) -> list[Row]:
    """Everybody with whom the caller shares a project of the organization; nobody when it is not the caller's."""
    return await store.of_organization(
        connection, identity.user_id, identity.project_ids, identity.organization_ids, organization_id
    )


async def find(connection: Connection, caller: Caller, member: UUID) -> Row:
    row = await store.get(connection, caller.project.id, member)
    if row is None:
        raise NotFoundError
    return row


async def add(connection: Connection, caller: Caller, body: MemberAdd) -> dict[str, Any]:
    """Let somebody in. Who has no account gets one, and the answer a path where they can set a password.

    Nobody gets such a link for an account that was there before: it would be the key to it.
    """
    members = await _roles(connection, caller)
    _only_admins(caller, members)
    user = await accounts.user_by_email(connection, body.email)
    new = user is None
    if user is None:
        name = body.first_name or body.email.partition("@")[0]
        user = await accounts.insert_user(connection, body.email, name, is_staff=False)
        if user is None:
            raise InvalidInputError(
                "Somebody else is adding this person at the moment. Try again.", attr="email"
            )
    elif user["id"] in members:
        detail = "This person is a member already: change the role with PATCH."
        raise InvalidInputError(detail, code="unique", attr="email")
    await accounts.insert_membership(connection, user["id"], caller.project.id, body.role)
    made = present.member(await find(connection, caller, user["uuid"]))
    if new:
        made["password_path"] = sign_in.link_path(await sign_in.new_link(connection, user["id"]))
    return made


async def change_role(connection: Connection, caller: Caller, member: UUID, role: str | None) -> Row:
    members = await _roles(connection, caller)
    _only_admins(caller, members)
    row = await _changed(connection, caller, member, members, stays_admin=role != "member")
    if role is not None:
        await accounts.insert_membership(connection, row["user_id"], caller.project.id, role)
    return await find(connection, caller, member)


async def remove(connection: Connection, caller: Caller, member: UUID) -> None:
    """Take somebody out, or leave. What they made stays; their keys and automations do nothing here any more."""
    members = await _roles(connection, caller)
    row = await _changed(connection, caller, member, members, stays_admin=False)
    await store.remove(connection, caller.project.id, row["user_id"])


async def _roles(connection: Connection, caller: Caller) -> dict[int, str]:
    """The project's members by their numbers, whom nobody changes meanwhile."""
    return {row["user_id"]: row["role"] for row in await store.lock(connection, caller.project.id)}


async def _changed(
    connection: Connection, caller: Caller, member: UUID, members: dict[int, str], *, stays_admin: bool
) -> Row:
    """The member, whom the caller may change. Raises LastAdminError when no admin would be left."""
    row = await find(connection, caller, member)
    if row["user_id"] != caller.user_id:
        _only_admins(caller, members)
    if [user for user, role in members.items() if role == "admin"] == [row["user_id"]] and not stays_admin:
        raise LastAdminError
    return row


def _only_admins(caller: Caller, members: dict[int, str]) -> None:
    """Those of the project, and whoever administers the site: as it is now, not as it was when the request came."""
    if members.get(caller.user_id) != "admin" and not caller.is_staff:
        raise NotAdminError
