"""Rules of OAuth: what a person is asked, what a client gets, and when a grant falls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, urlencode

from oauthlib.oauth2.rfc6749.errors import (
    AccessDeniedError,
    FatalClientError,
    InvalidRequestError,
    OAuth2Error,
)

from taskyard.accounts import oauth_store as store
from taskyard.accounts.oauth_grammar import Decision, Endpoints
from taskyard.accounts.tokens import token_hash
from taskyard.db.engine import Connection, Database, Row
from taskyard.errors import InvalidInputError
from taskyard.settings import OAuthSettings

CODE_LIFE = timedelta(minutes=5)
CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
"""A SHA-256 in base64 as RFC 7636 writes it."""

# oauthlib only reads the query of it.
AUTHORIZE, TOKEN, REVOKE = "https://server/authorize", "https://server/token", "https://server/revoke"

ABILITIES = {
    "*": "do everything that you may do",
    "task:read": "read tasks, runs, logs and artifacts",
    "task:write": "create and change tasks, start runs and talk to their agents",
}

Answer = tuple[dict[str, str], str, int]
"""Headers, body, status."""


class ClientRequestError(InvalidInputError):
    """The program that sent you here made a wrong request."""


class SendBackError(Exception):
    """The request is refused; the client hears of it at its own address."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asks a person for."""

    client_id: str
    client_name: str
    scopes: list[str]
    redirect_uri: str
    state: str | None
    one_project: bool
    """It wants to be let into one project, not into all."""


def read_request(settings: OAuthSettings, query: str) -> Asked:
    """The request of an authorization page.

    Raises ClientRequestError when the client or its address is not known, so that the person is not sent there,
    and SendBackError for everything else.
    """
    endpoints = Endpoints(Decision(settings.clients), settings, {})
    redirect_uri = ""
    try:
        redirect_uri = dict(parse_qsl(query)).get("redirect_uri", "")
        scopes, info = endpoints.validate_authorization_request(f"{AUTHORIZE}?{query}")
    except FatalClientError as error:
        raise ClientRequestError(
            f"The program that sent you here made a wrong request: {error.description or error.error}. "
            "Programs and their addresses are set in TASKYARD_OAUTH__CLIENTS."
        ) from error
    except OAuth2Error as error:
        raise SendBackError(error.in_uri(redirect_uri)) from error
    except ValueError as error:
        raise ClientRequestError(f"The program that sent you here made a wrong request: {error}") from error
    request = info["request"]
    if not CHALLENGE.fullmatch(request.code_challenge):
        wrong = InvalidRequestError(description="This is no S256 code challenge.", state=info["state"])
        raise SendBackError(wrong.in_uri(redirect_uri))
    return Asked(
        client_id=info["client_id"],
        client_name=settings.clients[info["client_id"]].name,
        scopes=scopes,
        redirect_uri=info["redirect_uri"],
        state=info["state"],
        one_project=getattr(request, "required_access_level", None) == "project",
    )


def denied(asked: Asked) -> str:
    """Where to send the browser of a person who said no."""
    return AccessDeniedError(state=asked.state).in_uri(asked.redirect_uri)


async def allow(
    connection: Connection,
    settings: OAuthSettings,
    query: str,
    asked: Asked,
    user_id: int,
    project_ids: Sequence[int] | None,
) -> str:
    """Grant what was asked, in these projects or in all; where to send the browser, with a code."""
    decision = Decision(settings.clients)
    headers, _, _ = Endpoints(decision, settings, {}).create_authorization_response(
        f"{AUTHORIZE}?{query}", scopes=asked.scopes
    )
    request = decision.new_code_request
    assert decision.new_code is not None  # `read_request` has checked the same query
    assert request is not None
    grant_id = await store.insert_grant(
        connection, user_id, asked.client_id, asked.scopes, None if project_ids is None else list(project_ids)
    )
    await store.insert_code(
        connection,
        token_hash(decision.new_code),
        grant_id,
        asked.redirect_uri,
        str(request.code_challenge),
        CODE_LIFE,
    )
    return str(headers["Location"])


async def token(database: Database, settings: OAuthSettings, body: bytes, content_type: str) -> Answer:
    """The token endpoint: a code or a refresh token against new tokens.

    What a second use of either brings down stays down: the refusal is an answer, not an exception, so that the
    transaction commits.
    """
    try:
        fields = _fields(body, content_type)
    except ValueError:
        return _unreadable()
    named = dict(fields)
    async with database.transaction() as connection:
        row, decision = await _read(connection, settings, named)
        limited = None if row is None else row["project_ids"]
        extra = {"scoped_teams": limited or [], "scoped_organizations": []}
        headers, text, status = Endpoints(decision, settings, extra).create_token_response(
            TOKEN, "POST", urlencode(fields), {}
        )
        if row is not None and decision.issued is not None:
            await _save(connection, settings, row, decision.issued, used_code="code_challenge" in row)
        if row is not None and decision.revoke:
            await store.revoke_grant(connection, row["grant_id"])
    return headers, text, status


async def revoke(database: Database, settings: OAuthSettings, body: bytes, content_type: str) -> Answer:
    """The revocation endpoint (RFC 7009): the whole grant goes, and an unknown token is as good as revoked."""
    try:
        fields = _fields(body, content_type)
    except ValueError:
        return _unreadable()
    async with database.transaction() as connection:
        row = await store.lock_token(connection, token_hash(dict(fields).get("token", "")))
        decision = Decision(settings.clients, token=row)
        headers, text, status = Endpoints(decision, settings, {}).create_revocation_response(
            REVOKE, "POST", urlencode(fields), {}
        )
        if row is not None and decision.revoke:
            await store.revoke_grant(connection, row["grant_id"])
    return headers, text or "{}", status


async def _read(
    connection: Connection, settings: OAuthSettings, fields: dict[str, str]
) -> tuple[Row | None, Decision]:
    if fields.get("grant_type") == "refresh_token":
        row = await store.lock_token(connection, token_hash(fields.get("refresh_token", "")))
        return row, Decision(settings.clients, token=row)
    row = await store.lock_code(connection, token_hash(fields.get("code", "")))
    return row, Decision(settings.clients, code=row)


async def _save(
    connection: Connection, settings: OAuthSettings, row: Row, issued: Any, *, used_code: bool
) -> None:
    if used_code:
        await store.use_code(connection, row["hash"])
    else:
        await store.use_token(connection, row["hash"])
        await store.delete_expired(connection, row["grant_id"])
    for kind, name, seconds, scopes in (
        ("access", "access_token", settings.access_token_s, issued["scope"].split()),
        ("refresh", "refresh_token", settings.refresh_token_s, row["scopes"]),
    ):
        await store.insert_token(
            connection, token_hash(issued[name]), row["grant_id"], kind, scopes, timedelta(seconds=seconds)
        )


def _fields(body: bytes, content_type: str) -> list[tuple[str, str]]:
    """The fields of a request: a form as the RFC has it, or the JSON object that some clients send.

    Raises ValueError for anything else.
    """
    text = body.decode("utf-8")
    if content_type.partition(";")[0].strip().lower() == "application/json":
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(value, dict):
            raise ValueError("not an object")
        fields = [(name, entry) for name, entry in value.items() if isinstance(entry, str)]
        urlencode(fields)  # a text with half of a surrogate pair is none
        return fields
    return parse_qsl(text, keep_blank_values=False)


def _unreadable() -> Answer:
    error = InvalidRequestError(description="The body is neither a form nor a JSON object.")
    return {"Content-Type": "application/json", "Cache-Control": "no-store"}, error.json, error.status_code
