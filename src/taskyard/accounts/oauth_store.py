"""SQL of OAuth: grants, and the codes and tokens that hang on them."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from taskyard.accounts.store import one
from taskyard.db.engine import Connection, Row


async def insert_grant(
    connection: Connection, user_id: int, client_id: str, scopes: list[str], project_ids: list[int] | None
) -> UUID:
    """What a person allowed a client. Grants of that person that nothing hangs on any more go."""
    await connection.execute(
        "DELETE FROM oauth_grants g WHERE g.user_id = %(user)s AND NOT EXISTS"
        " (SELECT 1 FROM oauth_tokens t WHERE t.grant_id = g.id AND t.expires_at > clock_timestamp())"
        " AND NOT EXISTS"
        " (SELECT 1 FROM oauth_codes c WHERE c.grant_id = g.id AND c.expires_at > clock_timestamp())",
        {"user": user_id},
    )
    row = await one(
        connection,
        "INSERT INTO oauth_grants (user_id, client_id, scopes, project_ids)"
        " VALUES (%(user)s, %(client)s, %(scopes)s, %(projects)s) RETURNING id",
        user=user_id,
        client=client_id,
        scopes=scopes,
        projects=project_ids,
    )
    assert row is not None
    return UUID(str(row["id"]))


async def insert_code(
    connection: Connection,
    code_hash: bytes,
    grant_id: UUID,
    redirect_uri: str,
    code_challenge: str,
    life: timedelta,
) -> None:
    await connection.execute(
        "INSERT INTO oauth_codes (hash, grant_id, redirect_uri, code_challenge, expires_at)"
        " VALUES (%(hash)s, %(grant)s, %(uri)s, %(challenge)s, clock_timestamp() + %(life)s)",
        {
            "hash": code_hash,
            "grant": grant_id,
            "uri": redirect_uri,
            "challenge": code_challenge,
            "life": life,
        },
    )


async def lock_code(connection: Connection, code_hash: bytes) -> Row | None:
    """A code with its grant, both locked: of two requests with one code the second sees the first's work."""
    return await one(
        connection,
        "SELECT c.hash, c.redirect_uri, c.code_challenge, c.used_at, c.expires_at > clock_timestamp() AS living,"
        " g.id AS grant_id, g.client_id, g.scopes, g.project_ids, g.revoked_at"
        " FROM oauth_codes c JOIN oauth_grants g ON g.id = c.grant_id WHERE c.hash = %(hash)s FOR UPDATE",
        hash=code_hash,
    )


async def lock_token(connection: Connection, token_hash: bytes) -> Row | None:
    """An access or refresh token with its grant, both locked."""
    return await one(
        connection,
        "SELECT t.hash, t.kind, t.used_at, t.expires_at > clock_timestamp() AS living,"
        " g.id AS grant_id, g.client_id, g.scopes, g.project_ids, g.revoked_at"
        " FROM oauth_tokens t JOIN oauth_grants g ON g.id = t.grant_id WHERE t.hash = %(hash)s FOR UPDATE",
        hash=token_hash,
    )


async def use_code(connection: Connection, code_hash: bytes) -> None:
    await connection.execute(
        "UPDATE oauth_codes SET used_at = clock_timestamp() WHERE hash = %(hash)s", {"hash": code_hash}
    )


async def use_token(connection: Connection, token_hash: bytes) -> None:
    await connection.execute(
        "UPDATE oauth_tokens SET used_at = clock_timestamp() WHERE hash = %(hash)s", {"hash": token_hash}
    )


async def insert_token(
    connection: Connection, token_hash: bytes, grant_id: UUID, kind: str, scopes: list[str], life: timedelta
) -> None:
    await connection.execute(
        "INSERT INTO oauth_tokens (hash, grant_id, kind, scopes, expires_at)"
        " VALUES (%(hash)s, %(grant)s, %(kind)s, %(scopes)s, clock_timestamp() + %(life)s)",
        {"hash": token_hash, "grant": grant_id, "kind": kind, "scopes": scopes, "life": life},
    )


async def delete_expired(connection: Connection, grant_id: UUID) -> None:
    await connection.execute(
        "DELETE FROM oauth_tokens WHERE grant_id = %(grant)s AND expires_at < clock_timestamp()",
        {"grant": grant_id},
    )


async def revoke_grant(connection: Connection, grant_id: UUID, user_id: int | None = None) -> None:
    """Make every code and token of a grant (of a user) useless."""
    await connection.execute(
        "UPDATE oauth_grants SET revoked_at = coalesce(revoked_at, clock_timestamp())"
        " WHERE id = %(grant)s AND (%(user)s::integer IS NULL OR user_id = %(user)s)",
        {"grant": grant_id, "user": user_id},
    )


async def living_grants(connection: Connection, user_id: int) -> list[Row]:
    """What a person has allowed and not taken back, oldest first."""
    query = (
        "SELECT g.id, g.client_id, g.created_at, g.last_used_at FROM oauth_grants g WHERE g.user_id = %(user)s"
        " AND g.revoked_at IS NULL AND EXISTS"
        " (SELECT 1 FROM oauth_tokens t WHERE t.grant_id = g.id AND t.expires_at > clock_timestamp())"
        " ORDER BY g.created_at, g.id"
    )
    return await (await connection.execute(query, {"user": user_id})).fetchall()
