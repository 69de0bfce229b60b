"""All routes of the accounts, for the application."""

from __future__ import annotations

from taskyard.accounts import api, members_api, oauth_api, sign_in_api

ROUTES = (
    api.MeController,
    api.KeyController,
    api.ProjectController,
    members_api.MemberController,
    api.IntegrationController,
    sign_in_api.login,
    sign_in_api.logout,
    sign_in_api.SignInPages,
    oauth_api.OAuthController,
)
