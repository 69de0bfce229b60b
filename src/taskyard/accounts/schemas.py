"""Bodies of the account endpoints."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import AwareDatetime, Field, StringConstraints

from taskyard.schemas import Body, Filled

SCOPES = ("*", "task:read", "task:write")
"""Every scope there is (tasks-api §1.3)."""


class KeyWrite(Body):
    """A new personal API key."""

    label: Annotated[Filled, StringConstraints(max_length=40)]
    scopes: Annotated[list[str], Field(min_length=1)]
    scoped_teams: list[int] | None = None
    scoped_organizations: list[UUID] | None = None
    expires_at: AwareDatetime | None = None


class SignIn(Body):
    """An address and a password; the password is taken as it is."""

    email: Filled
    password: Annotated[str, StringConstraints(strip_whitespace=False)]


class Invite(Body):
    """An invite code. There are none here: everybody who has an account has access."""

    code: Annotated[Filled, StringConstraints(max_length=50)]
