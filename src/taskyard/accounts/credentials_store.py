"""SQL that turns a credential into a person, a project and a role: one statement a request."""

from __future__ import annotations

from typing import LiteralString
from uuid import UUID

from taskyard.db.engine import Database, Row

# `c` is the credential: id, user_id, scopes, project_ids, organization_ids, stale. Without a project in the path
# it is the credential's only one, else the user's current one.
PERSON: LiteralString = """
SELECT c.id AS credential_id, c.scopes, c.project_ids, c.organization_ids, c.stale,
    u.id AS user_id, u.email, u.is_staff,
    p.id AS project_id, p.name AS project_name, p.organization_id, m.role{counted}
FROM c
JOIN users u ON u.id = c.user_id
LEFT JOIN projects p ON p.id = coalesce(
    %(project)s, CASE WHEN cardinality(c.project_ids) = 1 THEN c.project_ids[1] END, u.current_project_id)
LEFT JOIN memberships m ON m.project_id = p.id AND m.user_id = u.id
"""
WITHOUT_COUNT: LiteralString = PERSON.replace("{counted}", "")
WITH_COUNT: LiteralString = PERSON.replace("{counted}", ", (SELECT true FROM counted) AS counted")

STALE: LiteralString = (
    "(last_used_at IS NULL OR last_used_at < clock_timestamp() - interval '1 minute') AS stale"
)

KEY: LiteralString = (
    "WITH c AS (SELECT id, user_id, scopes, project_ids, organization_ids, "
    + STALE
    + """ FROM api_keys
    WHERE hash = %(hash)s AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp()))"""
)

# One row a key, locked while it counts, so that the count is exact however many processes there are. A refused
# request does not count: it changes no row, and `counted` is null.
COUNT: LiteralString = """,
counted AS (
    INSERT INTO key_usage AS k (key_id, minute_start, minute_count, hour_start, hour_count)
    SELECT id, clock_timestamp(), 1, clock_timestamp(), 1 FROM c
    ON CONFLICT (key_id) DO UPDATE SET
        minute_start = CASE WHEN k.minute_start <= excluded.minute_start - interval '1 minute'
            THEN excluded.minute_start ELSE k.minute_start END,
        minute_count = CASE WHEN k.minute_start <= excluded.minute_start - interval '1 minute'
            THEN 1 ELSE k.minute_count + 1 END,
        hour_start = CASE WHEN k.hour_start <= excluded.hour_start - interval '1 hour'
            THEN excluded.hour_start ELSE k.hour_start END,
        hour_count = CASE WHEN k.hour_start <= excluded.hour_start - interval '1 hour'
            THEN 1 ELSE k.hour_count + 1 END
    WHERE (k.minute_count < %(per_minute)s OR k.minute_start <= excluded.minute_start - interval '1 minute')
        AND (k.hour_count < %(per_hour)s OR k.hour_start <= excluded.hour_start - interval '1 hour')
    RETURNING 1
)"""

TOKEN: LiteralString = (
    "WITH c AS (SELECT g.id, g.user_id, t.scopes, g.project_ids, NULL::uuid[] AS organization_ids, "
    + STALE
    + """ FROM oauth_tokens t JOIN oauth_grants g ON g.id = t.grant_id
    WHERE t.hash = %(hash)s AND t.kind = 'access' AND t.expires_at > clock_timestamp() AND g.revoked_at IS NULL)"""
)

SESSION: LiteralString = (
    "WITH c AS (SELECT hash AS id, user_id, ARRAY['*'] AS scopes, NULL::integer[] AS project_ids,"
    " NULL::uuid[] AS organization_ids, "
    + STALE
    + " FROM sessions WHERE hash = %(hash)s AND expires_at > clock_timestamp()"
    " AND last_used_at > clock_timestamp() - make_interval(secs => %(idle)s))"
)


async def find_key(database: Database, key_hash: bytes, project_id: int | None) -> Row | None:
    """The living key with its user, the asked project (or the current one) and the user's role there."""
    return await database.fetch_one(KEY + WITHOUT_COUNT, hash=key_hash, project=project_id)


async def count_key(
    database: Database, key_hash: bytes, project_id: int | None, per_minute: int, per_hour: int
) -> Row | None:
    """As find_key, and counts the request; `counted` is None when a limit is reached."""
    return await database.fetch_one(
        KEY + COUNT + WITH_COUNT, hash=key_hash, project=project_id, per_minute=per_minute, per_hour=per_hour
    )


async def seconds_to_wait(database: Database, key_id: UUID, per_minute: int, per_hour: int) -> float:
    """How long a refused key has to wait; at least 0."""
    row = await database.fetch_one(
        "SELECT extract(epoch FROM greatest("
        " CASE WHEN minute_count >= %(per_minute)s THEN minute_start + interval '1 minute' END,"
        " CASE WHEN hour_count >= %(per_hour)s THEN hour_start + interval '1 hour' END"
        ") - clock_timestamp()) AS seconds FROM key_usage WHERE key_id = %(key)s",
        key=key_id,
        per_minute=per_minute,
        per_hour=per_hour,
    )
    return 0.0 if row is None or row["seconds"] is None else max(float(row["seconds"]), 0.0)


async def find_token(database: Database, token_hash: bytes, project_id: int | None) -> Row | None:
    """The same for a living OAuth access token; `credential_id` is its grant."""
    return await database.fetch_one(TOKEN + WITHOUT_COUNT, hash=token_hash, project=project_id)


async def find_session(
    database: Database, session_hash: bytes, project_id: int | None, idle_s: int
) -> Row | None:
    """The same for a living session that was used in the last `idle_s` seconds; `credential_id` is its hash."""
    return await database.fetch_one(
        SESSION + WITHOUT_COUNT, hash=session_hash, project=project_id, idle=idle_s
    )


async def touch_key(database: Database, key_id: UUID) -> None:
    await database.execute(
        "UPDATE api_keys SET last_used_at = clock_timestamp() WHERE id = %(id)s", id=key_id
    )


async def touch_grant(database: Database, grant_id: UUID) -> None:
    await database.execute(
        "UPDATE oauth_grants SET last_used_at = clock_timestamp() WHERE id = %(id)s", id=grant_id
    )


async def touch_session(database: Database, session_hash: bytes) -> None:
    await database.execute(
        "UPDATE sessions SET last_used_at = clock_timestamp() WHERE hash = %(hash)s", hash=session_hash
    )
