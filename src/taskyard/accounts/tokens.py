"""The random secrets of sign-in and OAuth. Only their hashes are stored."""

from __future__ import annotations

import hmac
import secrets

from taskyard.security import hash_api_key

ACCESS_PREFIX = "pha_"
REFRESH_PREFIX = "phr_"


def new_token(prefix: str = "") -> str:
    """256 random bits behind a prefix."""
    return prefix + secrets.token_urlsafe(32)


def token_hash(token: str) -> bytes:
    """What is stored of a token."""
    return hash_api_key(token)


def csrf_token(session: str) -> str:
    """What a page proves with that it can read the session's other cookie: derived, so nothing is stored."""
    return hmac.new(session.encode(), b"csrf", "sha256").hexdigest()


def csrf_matches(session: str, given: str) -> bool:
    return hmac.compare_digest(csrf_token(session).encode(), given.encode())
