"""What answers about people, projects, keys and sign-in look like; see `shapes`."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from msgspec import UNSET, Meta, UnsetType

from taskyard.openapi.shapes import Number, Page, Shape, Time, Uri, UserBasic


class Project(Shape):
    id: int
    uuid: UUID
    organization: UUID
    project_id: int
    name: str
    created_at: Time
    timezone: str
    is_demo: bool
    effective_membership_level: Literal[1, 8]


class OrganizationBasic(Shape):
    id: UUID
    name: str
    slug: str
    logo_media_id: str | None
    membership_level: Literal[1, 8]


class Organization(OrganizationBasic):
    created_at: Time
    teams: list[Project]
    projects: list[Project]


class User(UserBasic):
    """The caller."""

    is_staff: bool
    date_joined: Time
    has_password: bool
    team: Project | None
    organization: Organization | None
    organizations: list[OrganizationBasic]


class PaginatedProjectList(Page):
    results: list[Project]


class PaginatedOrganizationList(Page):
    results: list[Organization]


class Member(Shape):
    """Somebody who belongs to a project or an organization; the id is the user's."""

    id: UUID
    user: UserBasic
    role: Literal["member", "admin"]
    level: Literal[1, 8]
    joined_at: Time
    updated_at: Time


class AddedMember(Member):
    """A new member."""

    password_path: Annotated[
        str | UnsetType,
        Meta(description="For a new account: where a password can be set, once, within a day."),
    ] = UNSET


class PaginatedMemberList(Page):
    results: list[Member]


class PaginatedIntegrationList(Page):
    results: list[dict[str, Any]]


class PersonalAPIKey(Shape):
    """A personal API key; `value` is there only in the answer that made it."""

    id: UUID
    label: str
    mask_value: str
    user_id: int
    scopes: list[str]
    scoped_teams: list[int] | None
    scoped_organizations: list[UUID] | None
    created_at: Time
    last_used_at: Time | None
    last_rolled_at: Time | None
    expires_at: Time | None
    value: str | UnsetType = UNSET


class HasAccess(Shape):
    has_access: bool


class Success(Shape):
    success: Literal[True]


class Health(Shape):
    status: Literal["ok", "ready"]


class OAuthToken(Shape):
    """Tokens of an OAuth grant."""

    access_token: str
    refresh_token: str
    token_type: Literal["Bearer"]
    expires_in: Number
    scope: str
    scoped_teams: list[int] | UnsetType = UNSET
    scoped_organizations: list[UUID] | UnsetType = UNSET


class OAuthMetadata(Shape):
    """RFC 8414."""

    issuer: Uri
    authorization_endpoint: Uri
    token_endpoint: Uri
    revocation_endpoint: Uri
    scopes_supported: list[str]
    response_types_supported: list[str]
    response_modes_supported: list[str]
    grant_types_supported: list[str]
    token_endpoint_auth_methods_supported: list[str]
    revocation_endpoint_auth_methods_supported: list[str]
    code_challenge_methods_supported: list[str]
