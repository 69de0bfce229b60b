"""The operations of people, projects, keys and sign-in, and those of the server itself."""

from __future__ import annotations

from taskyard.accounts.schemas import Invite, KeyWrite, MemberAdd, MemberUpdate, SignIn, UserUpdate
from taskyard.openapi import account_shapes, shapes
from taskyard.openapi.operation import PROJECT, Answer, Operation, Parameter, Request, page_parameters

KEYS = "/api/personal_api_keys/"
INTEGRATIONS = "/api/environments/{project_id}/integrations/"
MEMBERS = PROJECT + "members/"
FORM = "application/x-www-form-urlencoded"
TOKEN_FORM = {
    "type": "object",
    "required": ["grant_type", "client_id"],
    "properties": {
        "grant_type": {"type": "string", "enum": ["authorization_code", "refresh_token"]},
        "client_id": {"type": "string"},
        "code": {"type": "string"},
        "redirect_uri": {"type": "string"},
        "code_verifier": {"type": "string"},
        "refresh_token": {"type": "string"},
        "scope": {"type": "string"},
    },
}
REVOKE_FORM = {
    "type": "object",
    "required": ["token", "client_id"],
    "properties": {"token": {"type": "string"}, "client_id": {"type": "string"}},
}
REFUSED = {400: Answer(shapes.OAuthError), 401: Answer(shapes.OAuthError)}
NOT_HERE = {200: Answer(schema={"type": "object"}, text="Not on this server: it has no integrations yet.")}

OPERATIONS = (
    Operation(
        "users_me_retrieve", "GET", "/api/users/@me/", "Who calls", "user", {200: Answer(account_shapes.User)}
    ),
    Operation(
        "users_partial_update",
        "PATCH",
        "/api/users/@me/",
        "Change the caller's name or current project",
        "task:write",
        {200: Answer(account_shapes.User)},
        Request("PatchedUserRequest", UserUpdate, required=False, example={"set_current_team": 2}),
        text="`set_current_team` or `set_current_organization` say what `@current` stands for from now on.",
    ),
    Operation(
        "projects_list",
        "GET",
        "/api/projects/",
        "List the caller's projects",
        "user",
        {200: Answer(account_shapes.PaginatedProjectList)},
        query=page_parameters(),
    ),
    Operation(
        "projects_retrieve",
        "GET",
        PROJECT,
        "Get a project",
        "task:read",
        {200: Answer(account_shapes.Project)},
    ),
    Operation(
        "organizations_list",
        "GET",
        "/api/organizations/",
        "List the caller's organizations",
        "user",
        {200: Answer(account_shapes.PaginatedOrganizationList)},
        query=page_parameters(),
    ),
    Operation(
        "organizations_retrieve",
        "GET",
        "/api/organizations/{id}/",
        "Get an organization",
        "user",
        {200: Answer(account_shapes.Organization)},
    ),
    Operation(
        "members_list",
        "GET",
        "/api/organizations/{id}/members/",
        "List the people of an organization",
        "user",
        {200: Answer(account_shapes.PaginatedMemberList)},
        query=page_parameters(),
        text="Those with whom the caller shares a project of it.",
    ),
    Operation(
        "project_members_list",
        "GET",
        MEMBERS,
        "List the members of a project",
        "task:read",
        {200: Answer(account_shapes.PaginatedMemberList)},
        query=page_parameters(),
    ),
    Operation(
        "project_members_create",
        "POST",
        MEMBERS,
        "Let somebody into a project",
        "*",
        {201: Answer(account_shapes.AddedMember)},
        Request("MemberRequest", MemberAdd, example={"email": "bob@example.org", "role": "member"}),
        text="For admins. Who has no account gets one.",
    ),
    Operation(
        "project_members_retrieve",
        "GET",
        MEMBERS + "{id}/",
        "Get a member of a project",
        "task:read",
        {200: Answer(account_shapes.Member)},
    ),
    Operation(
        "project_members_partial_update",
        "PATCH",
        MEMBERS + "{id}/",
        "Change the role of a member",
        "*",
        {200: Answer(account_shapes.Member)},
        Request("PatchedMemberRequest", MemberUpdate, required=False, example={"role": "admin"}),
        text="For admins. One admin has to stay.",
    ),
    Operation(
        "project_members_destroy",
        "DELETE",
        MEMBERS + "{id}/",
        "Take a member out of a project",
        "*",
        {204: Answer(media=None)},
        refuses=frozenset({400}),
        text="For admins, and for members who leave. One admin has to stay.",
    ),
    Operation(
        "code_invites_check_access_retrieve",
        "GET",
        "/api/code/invites/check-access/",
        "Ask whether the caller may use this",
        "user",
        {200: Answer(account_shapes.HasAccess)},
    ),
    Operation(
        "code_invites_redeem_create",
        "POST",
        "/api/code/invites/redeem/",
        "Redeem an invite",
        "user",
        {200: Answer(account_shapes.Success)},
        Request("InviteRedeemRequest", Invite, example={"code": "WELCOME"}),
        text="None is needed here: any code will do.",
    ),
    Operation(
        "personal_api_keys_list",
        "GET",
        KEYS,
        "List the caller's API keys",
        "session",
        {200: Answer(schema={"type": "array", "items": {"$ref": "#/components/schemas/PersonalAPIKey"}})},
    ),
    Operation(
        "personal_api_keys_create",
        "POST",
        KEYS,
        "Create an API key",
        "session",
        {201: Answer(account_shapes.PersonalAPIKey, text="The only answer that has its `value`.")},
        Request("PersonalAPIKeyRequest", KeyWrite, example={"label": "Laptop", "scopes": ["task:write"]}),
    ),
    Operation(
        "personal_api_keys_current_retrieve",
        "GET",
        KEYS + "@current/",
        "Get the API key of this very request",
        "user",
        {200: Answer(account_shapes.PersonalAPIKey)},
        refuses=frozenset({404}),
    ),
    Operation(
        "personal_api_keys_retrieve",
        "GET",
        KEYS + "{id}/",
        "Get an API key",
        "session",
        {200: Answer(account_shapes.PersonalAPIKey)},
    ),
    Operation(
        "personal_api_keys_destroy",
        "DELETE",
        KEYS + "{id}/",
        "Revoke an API key",
        "session",
        {204: Answer(media=None)},
    ),
    Operation(
        "integrations_list",
        "GET",
        INTEGRATIONS,
        "List integrations",
        "task:read",
        {200: Answer(account_shapes.PaginatedIntegrationList)},
        query=page_parameters(),
        text="There are none yet.",
    ),
    Operation(
        "integrations_retrieve",
        "GET",
        INTEGRATIONS + "{id}/",
        "Get an integration",
        "task:read",
        NOT_HERE,
    ),
    Operation(
        "integrations_github_repos_retrieve",
        "GET",
        INTEGRATIONS + "{id}/github_repos/",
        "List the repositories of an integration",
        "task:read",
        NOT_HERE,
    ),
    Operation(
        "integrations_github_branches_retrieve",
        "GET",
        INTEGRATIONS + "{id}/github_branches/",
        "List the branches of a repository",
        "task:read",
        NOT_HERE,
    ),
    Operation(
        "login_create",
        "POST",
        "/api/login/",
        "Sign in",
        "anybody",
        {
            200: Answer(
                account_shapes.Success, headers={"Set-Cookie": "The session, and the token against forgery."}
            )
        },
        Request("LoginRequest", SignIn, example={"email": "ada@example.org", "password": "correct horse"}),
        refuses=frozenset({403, 429}),
    ),
    Operation(
        "logout_create", "POST", "/api/logout/", "Sign out", "session", {200: Answer(account_shapes.Success)}
    ),
    Operation(
        "oauth_metadata_retrieve",
        "GET",
        "/.well-known/oauth-authorization-server",
        "What OAuth clients can know of this server",
        "anybody",
        {200: Answer(account_shapes.OAuthMetadata)},
    ),
    Operation(
        "oauth_token_create",
        "POST",
        "/oauth/token",
        "Exchange a code or a refresh token",
        "anybody",
        {200: Answer(account_shapes.OAuthToken), **REFUSED},
        content=(FORM, TOKEN_FORM),
    ),
    Operation(
        "oauth_revoke_create",
        "POST",
        "/oauth/revoke",
        "Revoke a token",
        "anybody",
        {200: Answer(schema={"type": "object"}), **REFUSED},
        content=(FORM, REVOKE_FORM),
    ),
    Operation(
        "schema_retrieve",
        "GET",
        "/api/schema/",
        "This description",
        "anybody",
        {200: Answer(media="application/vnd.oai.openapi, application/vnd.oai.openapi+json", schema={})},
        query=(
            Parameter(
                "format", {"type": "string", "enum": ["yaml", "json"]}, "Else the `Accept` header decides."
            ),
        ),
    ),
    Operation(
        "health_retrieve",
        "GET",
        "/health",
        "Whether it lives",
        "anybody",
        {200: Answer(account_shapes.Health)},
    ),
    Operation(
        "ready_retrieve",
        "GET",
        "/ready",
        "Whether it can serve",
        "anybody",
        {200: Answer(account_shapes.Health)},
        refuses=frozenset({503}),
    ),
)
