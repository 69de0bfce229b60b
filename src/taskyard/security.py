"""Secrets of our own: API keys and their hashes."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

KEY_PREFIX = "phx_"


def new_api_key() -> str:
    """A personal API key: 256 random bits behind the prefix that clients expect."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_api_key(key: str) -> bytes:
    """What is stored of a key. A plain digest suffices: the key is random, not chosen by a person."""
    return hashlib.sha256(key.encode()).digest()


def mask_api_key(key: str) -> str:
    """How a key is shown in lists."""
    return f"{key[:8]}…{key[-4:]}"


URL_REUSE_S = 3300
"""The same signed URL is given out for 55 minutes (tasks-api §3)."""
URL_VALID_S = 3600
"""A signed URL is valid for at least this long."""


class Signer:
    """Signs URLs that work without credentials, with a key that all processes of a site share."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def query(self, subject: str) -> str:
        """`expires=…&signature=…` for a subject such as a path; stable for URL_REUSE_S seconds."""
        now = int(time.time())
        expires = now - now % URL_REUSE_S + URL_REUSE_S + URL_VALID_S
        return f"expires={expires}&signature={self._sign(subject, expires)}"

    def valid(self, subject: str, expires: str, signature: str) -> bool:
        """Whether the query of a URL was made by `query` and has not expired."""
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12):
            return False
        made = self._sign(subject, int(expires))
        return hmac.compare_digest(made.encode(), signature.encode()) and int(expires) >= time.time()

    def _sign(self, subject: str, expires: int) -> str:
        return hmac.new(self._key, f"{subject}\n{expires}".encode(), hashlib.sha256).hexdigest()
