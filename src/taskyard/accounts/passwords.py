"""Passwords: argon2id with the parameters of RFC 9106, computed beside the event loop."""

from __future__ import annotations

import asyncio
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from taskyard.errors import InvalidInputError

MIN_LENGTH = 10
MAX_LENGTH = 1000

_hasher = PasswordHasher()
# Each hash takes 64 MiB: two at a time is all that a flood of sign-ins may have.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="password")


def check(password: str) -> None:
    """Refuse a new password that is too short or too long: InvalidInputError."""
    if len(password) < MIN_LENGTH:
        raise InvalidInputError(
            f"This password is too short. It must contain at least {MIN_LENGTH} characters.",
            code="password_too_short",
            attr="password",
        )
    if len(password) > MAX_LENGTH:
        raise InvalidInputError(
            f"Ensure this field has no more than {MAX_LENGTH} characters.",
            code="max_length",
            attr="password",
        )


async def hash_password(password: str) -> str:
    """The text to store."""
    return await asyncio.get_running_loop().run_in_executor(_threads, _hasher.hash, _normal(password))


async def verify(stored: str | None, password: str) -> bool:
    """Whether a password is the one that was stored. Takes the same time when none was."""
    return await asyncio.get_running_loop().run_in_executor(_threads, _verify, stored, _normal(password))


def outdated(stored: str | None) -> bool:
    """Whether it was hashed with other parameters than today's."""
    return stored is not None and _hasher.check_needs_rehash(stored)


def _verify(stored: str | None, password: str) -> bool:
    try:
        right = _hasher.verify(stored or _nobodys(), password)
    except (VerificationError, InvalidHashError):
        return False
    return right and stored is not None


@cache
def _nobodys() -> str:
    return _hasher.hash("nobody has this password")


def _normal(password: str) -> str:
    """The same characters typed on another keyboard are the same password (NIST SP 800-63B)."""
    return unicodedata.normalize("NFKC", password[: MAX_LENGTH + 1])
