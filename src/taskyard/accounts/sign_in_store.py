"""SQL of signing in: sessions, one-time links, counted attempts."""

from __future__ import annotations

from datetime import timedelta

from taskyard.accounts.store import one
from taskyard.db.engine import Connection, Database


async def insert_session(connection: Connection, session_hash: bytes, user_id: int, life: timedelta) -> None:
    """A new session of a user; some that have ended go, whosesoever they are."""
    await connection.execute(
        "DELETE FROM sessions WHERE hash IN (SELECT hash FROM sessions WHERE expires_at < clock_timestamp()"
        " LIMIT 100 FOR UPDATE SKIP LOCKED)"
    )
    await connection.execute(
        "INSERT INTO sessions (hash, user_id, expires_at)"
        " VALUES (%(hash)s, %(user)s, clock_timestamp() + %(life)s)",
        {"hash": session_hash, "user": user_id, "life": life},
    )


async def delete_session(connection: Connection, session_hash: bytes) -> None:
    await connection.execute("DELETE FROM sessions WHERE hash = %(hash)s", {"hash": session_hash})


async def end_sign_ins(connection: Connection, user_id: int) -> None:
    """End every session of a user and spend the links with which a password could be set."""
    await connection.execute("DELETE FROM sessions WHERE user_id = %(user)s", {"user": user_id})
    await connection.execute("DELETE FROM password_links WHERE user_id = %(user)s", {"user": user_id})


async def insert_link(connection: Connection, link_hash: bytes, user_id: int, life: timedelta) -> None:
    await connection.execute("DELETE FROM password_links WHERE expires_at < clock_timestamp()")
    await connection.execute(
        "INSERT INTO password_links (hash, user_id, expires_at)"
        " VALUES (%(hash)s, %(user)s, clock_timestamp() + %(life)s)",
        {"hash": link_hash, "user": user_id, "life": life},
    )


async def user_of_link(connection: Connection, link_hash: bytes) -> int | None:
    """Whose living link it is; the row stays locked, so a link works once."""
    row = await one(
        connection,
        "SELECT user_id FROM password_links WHERE hash = %(hash)s AND expires_at > clock_timestamp() FOR UPDATE",
        hash=link_hash,
    )
    return None if row is None else int(row["user_id"])


async def count_attempt(database: Database, subject: bytes, window: timedelta) -> tuple[int, float]:
    """Count one attempt; how many the window now has, and the seconds until it ends."""
    row = await database.fetch_one(
        "INSERT INTO sign_in_attempts AS a (subject, expires_at, count)"
        " VALUES (%(subject)s, clock_timestamp() + %(window)s, 1)"
        " ON CONFLICT (subject) DO UPDATE SET"
        " count = CASE WHEN a.expires_at <= clock_timestamp() THEN 1 ELSE a.count + 1 END,"
        " expires_at = CASE WHEN a.expires_at <= clock_timestamp() THEN excluded.expires_at ELSE a.expires_at END"
        " RETURNING count, extract(epoch FROM expires_at - clock_timestamp()) AS seconds",
        subject=subject,
        window=window,
    )
    assert row is not None
    return row["count"], float(row["seconds"])


async def forget_attempts(connection: Connection, subject: bytes) -> None:
    """Forget the attempts of a subject, and some whose window has ended."""
    await connection.execute(
        "DELETE FROM sign_in_attempts WHERE subject = %(subject)s OR subject IN ("
        "SELECT subject FROM sign_in_attempts WHERE expires_at <= clock_timestamp() LIMIT 100"
        " FOR UPDATE SKIP LOCKED)",
        {"subject": subject},
    )
