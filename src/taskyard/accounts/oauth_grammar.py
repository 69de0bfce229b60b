"""OAuth 2 as oauthlib speaks it, for public clients with PKCE (RFC 6749, RFC 7636, RFC 8252).

oauthlib is not asynchronous, and need not be: the rows that a request names are read (and locked) first, oauthlib
decides on them here, and what it decided is written afterwards, in the same transaction (`oauth`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from oauthlib.common import Request
from oauthlib.oauth2 import (
    AuthorizationCodeGrant,
    AuthorizationEndpoint,
    BearerToken,
    RefreshTokenGrant,
    RequestValidator,
    RevocationEndpoint,
    TokenEndpoint,
)
from oauthlib.oauth2.rfc6749.grant_types.authorization_code import code_challenge_method_s256

from taskyard.accounts.schemas import SCOPES
from taskyard.accounts.tokens import ACCESS_PREFIX, REFRESH_PREFIX, new_token
from taskyard.db.engine import Row
from taskyard.settings import LOOPBACK_HOSTS, OAuthClient, OAuthSettings

DEFAULT_SCOPES = ["task:read", "task:write"]


@dataclass(frozen=True, slots=True)
class Client:
    """The shape in which oauthlib wants a client."""

    client_id: str


class Decision(RequestValidator):
    """Answers oauthlib's questions from what was read, and keeps what it wants to have written."""

    def __init__(
        self, clients: Mapping[str, OAuthClient], *, code: Row | None = None, token: Row | None = None
    ) -> None:
        super().__init__()
        self._clients = clients
        self._code = code
        self._token = token
        self.new_code: str | None = None
        self.new_code_request: Request | None = None
        self.issued: Mapping[str, Any] | None = None
        self.revoke: bool = False
        """A code or refresh token came a second time, or the client asks for it: the whole grant falls."""

    # Clients

    def client_authentication_required(self, *_: Any, **__: Any) -> bool:
        return False

    def authenticate_client_id(self, client_id: str, request: Request, *_: Any, **__: Any) -> bool:
        if client_id not in self._clients:
            return False
        request.client = Client(client_id)
        return True

    def validate_client_id(self, client_id: str, request: Request, *_: Any, **__: Any) -> bool:
        return self.authenticate_client_id(client_id, request)

    def validate_redirect_uri(self, client_id: str, redirect_uri: str, *_: Any, **__: Any) -> bool:
        return any(same_target(known, redirect_uri) for known in self._clients[client_id].redirect_uris)

    def get_default_redirect_uri(self, *_: Any, **__: Any) -> str:
        return ""  # it has to be sent, always

    def validate_response_type(self, client_id: str, response_type: str, *_: Any, **__: Any) -> bool:
        return response_type == "code"

    def validate_grant_type(self, client_id: str, grant_type: str, *_: Any, **__: Any) -> bool:
        return grant_type in ("authorization_code", "refresh_token")

    def is_pkce_required(self, *_: Any, **__: Any) -> bool:
        return True

    # Scopes: known ones are granted, the others dropped; the answer says which (RFC 6749 §3.3)

    def get_default_scopes(self, *_: Any, **__: Any) -> list[str]:
        return DEFAULT_SCOPES

    def validate_scopes(
        self, client_id: str, scopes: list[str], client: Any, request: Request, *_: Any, **__: Any
    ) -> bool:
        request.scopes = [scope for scope in scopes if scope in SCOPES]
        return bool(request.scopes)

    # Codes

    def save_authorization_code(
        self, client_id: str, code: Any, request: Request, *_: Any, **__: Any
    ) -> None:
        self.new_code, self.new_code_request = code["code"], request

    def validate_code(
        self, client_id: str, code: str, client: Any, request: Request, *_: Any, **__: Any
    ) -> bool:
        row = self._code
        if row is None or row["client_id"] != client_id or row["revoked_at"] is not None:
            return False
        if row["used_at"] is not None:
            self.revoke = True
            return False
        request.scopes, request.user = row["scopes"], row["grant_id"]
        return bool(row["living"])

    def get_code_challenge(self, *_: Any, **__: Any) -> str:
        assert self._code is not None
        return str(self._code["code_challenge"])

    def get_code_challenge_method(self, *_: Any, **__: Any) -> str:
        return "S256"

    def confirm_redirect_uri(self, client_id: str, code: str, redirect_uri: str, *_: Any, **__: Any) -> bool:
        assert self._code is not None
        return bool(redirect_uri == self._code["redirect_uri"])

    def invalidate_authorization_code(self, *_: Any, **__: Any) -> None:
        pass  # whoever writes the tokens marks the code

    # Tokens

    def validate_refresh_token(
        self, refresh_token: str, client: Any, request: Request, *_: Any, **__: Any
    ) -> bool:
        row = self._token
        if row is None or row["kind"] != "refresh" or row["client_id"] != client.client_id:
            return False
        if row["revoked_at"] is not None or not row["living"]:
            return False
        if row["used_at"] is not None:
            self.revoke = True
            return False
        request.user = row["grant_id"]
        return True

    def get_original_scopes(self, *_: Any, **__: Any) -> list[str]:
        assert self._token is not None
        return list(self._token["scopes"])

    def rotate_refresh_token(self, *_: Any, **__: Any) -> bool:
        return True

    def save_token(self, token: Mapping[str, Any], *_: Any, **__: Any) -> None:
        self.issued = token

    def revoke_token(self, token: str, token_type_hint: str, request: Request, *_: Any, **__: Any) -> None:
        self.revoke = self._token is not None and self._token["client_id"] == request.client_id


def same_target(known: str, given: str) -> bool:
    """Whether a redirect URI is the registered one: exactly, but for the port of a loopback address."""
    if known == given:
        return True
    one, other = urlsplit(known), urlsplit(given)
    try:
        ports_are_ports = (one.port, other.port) is not None
    except ValueError:
        return False
    return (
        ports_are_ports
        and one.scheme == other.scheme == "http"
        and one.hostname == other.hostname
        and one.hostname in LOOPBACK_HOSTS
        and "@" not in other.netloc
        and (one.path, one.query) == (other.path, other.query)
        and "#" not in given
    )


class CodeGrant(AuthorizationCodeGrant):
    """Without the challenge method `plain`, which protects nothing."""

    _code_challenge_methods = {"S256": code_challenge_method_s256}  # noqa: RUF012 - oauthlib's own way


class Endpoints(AuthorizationEndpoint, TokenEndpoint, RevocationEndpoint):
    """oauthlib's endpoints for one request."""

    def __init__(self, decision: Decision, settings: OAuthSettings, extra: Mapping[str, Any]) -> None:
        """`extra` goes into the answer beside the tokens."""
        code, refresh = CodeGrant(decision), RefreshTokenGrant(decision)
        for grant in (code, refresh):
            grant.register_token_modifier(lambda token, *_: {**token, **extra})
        bearer = BearerToken(
            decision,
            expires_in=settings.access_token_s,
            token_generator=lambda *_: new_token(ACCESS_PREFIX),
            refresh_token_generator=lambda *_: new_token(REFRESH_PREFIX),
        )
        kinds = {"authorization_code": code, "refresh_token": refresh}
        AuthorizationEndpoint.__init__(self, "code", bearer, {"code": code})  # type: ignore[arg-type] # the stub says str
        TokenEndpoint.__init__(self, "authorization_code", bearer, kinds)  # type: ignore[arg-type] # likewise
        RevocationEndpoint.__init__(self, decision)
