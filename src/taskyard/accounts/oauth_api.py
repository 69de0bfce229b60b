"""OAuth 2 for other programs: the consent page, tokens, and where to find them (tasks-api §1.3, §12)."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlsplit

from litestar import Controller, Response, get, post

from taskyard.accounts import oauth, oauth_store, pages, store
from taskyard.accounts.pages import Req, SignedIn
from taskyard.accounts.schemas import SCOPES
from taskyard.db.engine import Row
from taskyard.errors import InvalidInputError, TaskyardError
from taskyard.http import answer, origin_of, path_uuid


class OAuthController(Controller):
    @get("/.well-known/oauth-authorization-server")
    async def metadata(self, request: Req) -> Response[bytes]:
        """What clients can know of this server (RFC 8414)."""
        origin = origin_of(request)
        return answer(
            {
                "issuer": origin,
                "authorization_endpoint": f"{origin}/oauth/authorize",
                "token_endpoint": f"{origin}/oauth/token",
                "revocation_endpoint": f"{origin}/oauth/revoke",
                "scopes_supported": list(SCOPES),
                "response_types_supported": ["code"],
                "response_modes_supported": ["query"],
                "grant_types_supported": ["authorization_code", "refresh_token"],
                "token_endpoint_auth_methods_supported": ["none"],
                "revocation_endpoint_auth_methods_supported": ["none"],
                "code_challenge_methods_supported": ["S256"],
            }
        )

    @get("/oauth/authorize", exception_handlers={TaskyardError: pages.problem})
    async def ask(self, request: Req) -> Response[Any]:
        """Ask the person at the browser, after signing in."""
        query = _query(request)
        try:
            asked = oauth.read_request(request.app.state.settings.oauth, query)
        except oauth.SendBackError as error:
            return pages.go_to(error.location)
        person = await pages.signed_in(request)
        if person is None:
            return pages.go_to("/login?next=" + quote(f"/oauth/authorize?{query}", safe=""))
        return pages.render(
            "consent.html",
            client=asked.client_name,
            email=person.row["email"],
            abilities=[oauth.ABILITIES[scope] for scope in asked.scopes],
            target=_shown(asked.redirect_uri),
            query=query,
            csrf=person.csrf,
            one_project=asked.one_project,
            projects=await _projects(request, person),
            current=person.row["project_id"],
        )

    @post("/oauth/authorize", status_code=200, exception_handlers={TaskyardError: pages.problem})
    async def decide(self, request: Req) -> Response[Any]:
        """What the person said: back to the client, with a code or a refusal."""
        fields = await pages.form(request)
        settings, query = request.app.state.settings.oauth, _query(request)
        try:
            asked = oauth.read_request(settings, query)
        except oauth.SendBackError as error:
            return pages.go_to(error.location)
        person = await pages.signed_in(request)
        if person is None:
            return pages.go_to("/login?next=" + quote(f"/oauth/authorize?{query}", safe=""))
        pages.check_csrf(person, fields)
        if fields.get("decision") != "allow":
            return pages.go_to(oauth.denied(asked))
        chosen = fields.get("project", "")
        projects = {str(row["id"]): row["id"] for row in await _projects(request, person)}
        if chosen not in projects and (chosen or asked.one_project):
            raise InvalidInputError("Choose one of your projects.")
        async with request.app.state.database.transaction() as connection:
            location = await oauth.allow(
                connection,
                settings,
                query,
                asked,
                person.row["user_id"],
                [projects[chosen]] if chosen else None,
            )
        return pages.go_to(location)

    @get("/account", exception_handlers={TaskyardError: pages.problem})
    async def account(self, request: Req) -> Response[Any]:
        """Who is signed in, and which programs may act for them."""
        person = await pages.signed_in(request)
        if person is None:
            return pages.go_to("/login?next=%2Faccount")
        clients = request.app.state.settings.oauth.clients
        async with request.app.state.database.connection() as connection:
            rows = await oauth_store.living_grants(connection, person.row["user_id"])
        programs = [
            {
                "id": row["id"],
                "name": clients[row["client_id"]].name if row["client_id"] in clients else row["client_id"],
                "since": f"{row['created_at']:%Y-%m-%d}",
            }
            for row in rows
        ]
        return pages.render("account.html", email=person.row["email"], csrf=person.csrf, programs=programs)

    @post("/account/revoke", status_code=200, exception_handlers={TaskyardError: pages.problem})
    async def take_back(self, request: Req) -> Response[Any]:
        """Take back what a person allowed a program."""
        fields = await pages.form(request)
        person = await pages.signed_in(request)
        if person is not None:
            pages.check_csrf(person, fields)
            async with request.app.state.database.transaction() as connection:
                await oauth_store.revoke_grant(
                    connection, path_uuid(fields.get("grant", "")), person.row["user_id"]
                )
        return pages.go_to("/account")

    @post("/oauth/token", status_code=200)
    async def token(self, request: Req) -> Response[str]:
        return _plain(await oauth.token(*await _sent(request)))

    @post("/oauth/revoke", status_code=200)
    async def revoke(self, request: Req) -> Response[str]:
        return _plain(await oauth.revoke(*await _sent(request)))


async def _sent(request: Req) -> tuple[Any, Any, bytes, str]:
    state = request.app.state
    return (
        state.database,
        state.settings.oauth,
        await request.body(),
        request.headers.get("content-type", ""),
    )


def _plain(made: oauth.Answer) -> Response[str]:
    headers, text, status = made
    rest = {name: value for name, value in headers.items() if name.lower() != "content-type"}
    return Response(text, status_code=status, media_type="application/json", headers=rest)


def _query(request: Req) -> str:
    return bytes(request.scope.get("query_string", b"")).decode("ascii", "replace")


def _shown(uri: str) -> str:
    """A redirect target as a person should judge it: where it leads, without the rest."""
    url = urlsplit(uri)
    return f"{url.scheme}://{url.netloc}" if url.netloc else f"{url.scheme}:"


async def _projects(request: Req, person: SignedIn) -> list[Row]:
    async with request.app.state.database.connection() as connection:
        return await store.visible_projects(connection, person.row["user_id"], None, None)
