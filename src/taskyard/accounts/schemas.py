"""Bodies of the account endpoints."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints
from pydantic_core import PydanticCustomError

from taskyard.schemas import Body, Filled, NotNull, Text

SCOPES = ("*", "task:read", "task:write")
"""Every scope there is (tasks-api §1.3)."""


def is_email(text: str) -> bool:
    return re.fullmatch(r"[^@\s]+@[^@\s]+", text) is not None


def _email(value: str) -> str:
    if not is_email(value):
        raise PydanticCustomError("email", "Enter a valid email address.")
    return value


Email = Annotated[Filled, StringConstraints(max_length=254), AfterValidator(_email)]
Name = Annotated[Text, StringConstraints(max_length=150)]
Role = Literal["member", "admin"]


def _utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("datetime", "This time is after the year 9999.") from None


class MemberAdd(Body):
    """Somebody who joins a project; the name counts for a new account only."""

    email: Email
    role: Role = "member"
    first_name: Name = ""


class MemberUpdate(Body):
    role: Annotated[Role | None, NotNull] = None


class UserUpdate(Body):
    """What people change about themselves; the last two are how clients switch between projects."""

    first_name: Annotated[Name | None, NotNull] = None
    last_name: Annotated[Name | None, NotNull] = None
    set_current_team: int | None = None
    set_current_organization: UUID | None = None


class KeyWrite(Body):
    """A new personal API key."""

    label: Annotated[Filled, StringConstraints(max_length=40)]
    scopes: Annotated[list[str], Field(min_length=1)]
    scoped_teams: list[int] | None = None
    scoped_organizations: list[UUID] | None = None
    expires_at: Annotated[AwareDatetime, AfterValidator(_utc)] | None = None


class SignIn(Body):
    """An address and a password; the password is taken as it is."""

    email: Filled
    password: Annotated[str, StringConstraints(strip_whitespace=False)]


class Invite(Body):
    """An invite code. There are none here: everybody who has an account has access."""

    code: Annotated[Filled, StringConstraints(max_length=50)]
