"""Rules of signing in with a password, and of setting one."""

from __future__ import annotations

import hashlib
import ipaddress
from datetime import timedelta

from taskyard.accounts import passwords, store
from taskyard.accounts import sign_in_store as sessions
from taskyard.accounts.tokens import new_token, token_hash
from taskyard.db.engine import Connection, Database, Row
from taskyard.errors import InvalidInputError, NotFoundError, ThrottledError

SESSION_LIFE = timedelta(days=30)
LINK_LIFE = timedelta(hours=24)

LIMITS = (
    ("pair", 10, timedelta(minutes=15)),  # one account from one address
    ("address", 100, timedelta(minutes=15)),
    ("account", 200, timedelta(hours=1)),  # from however many addresses
)
"""Attempts to sign in that are allowed: of whom, how many, within what time."""


class InvalidLinkError(NotFoundError):
    """This link was used already or has expired. Ask for a new one: `taskyard admin set-password EMAIL --link`."""


async def sign_in(database: Database, email: str, password: str, address: str) -> str:
    """A new session, as the value of its cookie.

    Raises InvalidInputError (`invalid_credentials`), the same for an unknown address and a wrong password, and
    ThrottledError after too many attempts. Attempts are counted before the password is looked at.
    """
    email = email.strip().lower()
    subjects = {name: _subject(name, email, network(address)) for name, _, _ in LIMITS}
    for name, allowed, window in LIMITS:
        count, seconds = await sessions.count_attempt(database, subjects[name], window)
        if count > allowed:
            raise ThrottledError(seconds)
    session = None
    while session is None:
        session = await _sign_in(database, email, password, subjects["pair"])
    return session


async def _sign_in(database: Database, email: str, password: str, pair: bytes) -> str | None:
    """The same, without counting; None when the stored hash was replaced while it was looked at.

    By another password, perhaps: who knows only the old one is not let in, and does not bring it back. Or by another
    sign-in, which hashed the same one anew.
    """
    async with database.connection() as connection:
        user = await store.user_by_email(connection, email)
    stored = None if user is None else user["password_hash"]
    if not await passwords.verify(stored, password) or user is None:
        raise InvalidInputError("Invalid email or password.", code="invalid_credentials")
    fresh = await passwords.hash_password(password) if passwords.outdated(stored) else None
    async with database.transaction() as connection:
        if await store.lock_password(connection, user["id"]) != stored:
            return None
        if fresh is not None:
            await store.set_password(connection, user["id"], fresh)
        await sessions.forget_attempts(connection, pair)
        return await new_session(connection, user["id"])


async def new_session(connection: Connection, user_id: int) -> str:
    session = new_token()
    await sessions.insert_session(connection, token_hash(session), user_id, SESSION_LIFE)
    return session


async def sign_out(connection: Connection, session: str) -> None:
    await sessions.delete_session(connection, token_hash(session))


async def new_link(connection: Connection, user_id: int) -> str:
    """A token with which this user can set a password once, within a day."""
    token = new_token()
    await sessions.insert_link(connection, token_hash(token), user_id, LINK_LIFE)
    return token


def link_path(token: str) -> str:
    """The path of the server where a link's token is used."""
    return f"/set-password?token={token}"


async def user_of_link(connection: Connection, token: str) -> Row:
    """Whose link it is. Raises InvalidLinkError."""
    user_id = await sessions.user_of_link(connection, token_hash(token))
    if user_id is None:
        raise InvalidLinkError
    return await store.user_by_id(connection, user_id)


async def set_password_by_link(database: Database, token: str, password: str) -> str:
    """Set the password of the link's user and sign them in; the new session. Raises InvalidLinkError."""
    passwords.check(password)
    async with database.transaction() as connection:
        user = await user_of_link(connection, token)
        await replace_password(connection, user["id"], await passwords.hash_password(password))
        return await new_session(connection, user["id"])


async def replace_password(connection: Connection, user_id: int, hashed: str) -> None:
    """Store a password; whoever was signed in with the old one is signed out."""
    await store.set_password(connection, user_id, hashed)
    await sessions.end_sign_ins(connection, user_id)


def network(address: str) -> str:
    """What counts as one address: a machine in IPv4, a customer's network (/64) in IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False).network_address)
    return str(parsed)


def _subject(name: str, email: str, address: str) -> bytes:
    parts = {"pair": (address, email), "address": (address,), "account": (email,)}[name]
    return hashlib.sha256("\0".join((name, *parts)).encode()).digest()
