"""Tokens for one run: RS256 JWTs with a key pair that all processes of a site share (tasks-api §6.5, §6.8)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from taskyard.db.engine import Database, Row
from taskyard.errors import AuthenticationFailedError

CONNECTION = "posthog:sandbox_connection"
INGEST = "posthog:sandbox_event_ingest"
CONNECTION_S = 24 * 3600
KEY_NAME = "runs"
ALGORITHM = "RS256"


@dataclass(frozen=True, slots=True)
class Ingest:
    """What a token for the upload of events allows."""

    run_id: UUID
    task_id: UUID
    project_id: int


class RunTokens:
    """Makes and checks the tokens. Load it once for a process."""

    def __init__(self, private_key: rsa.RSAPrivateKey) -> None:
        self._private = private_key
        self._public = private_key.public_key()

    @classmethod
    async def load(cls, database: Database) -> RunTokens:
        """The site's key pair out of the database; the first process makes it."""
        query = "SELECT key FROM signing_keys WHERE name = %(name)s"
        row = await database.fetch_one(query, name=KEY_NAME)
        if row is None:
            await database.execute(
                "INSERT INTO signing_keys (name, key) VALUES (%(name)s, %(key)s) ON CONFLICT DO NOTHING",
                name=KEY_NAME,
                key=await asyncio.to_thread(_new_key),
            )
            row = await database.fetch_one(query, name=KEY_NAME)
        assert row is not None
        key = load_pem_private_key(bytes(row["key"]), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        return cls(key)

    def connection(self, run: Row, user_id: int, distinct_id: str, mode: str) -> str:
        """For talking to the agent of a run as this user, 24 hours."""
        claims = _claims(run) | {"user_id": user_id, "distinct_id": distinct_id, "mode": mode}
        return self._sign(claims, CONNECTION, CONNECTION_S)

    def ingest(self, run: Row, lifetime_s: float) -> str:
        """For uploading the events of a run."""
        return self._sign(_claims(run), INGEST, lifetime_s)

    def check_ingest(self, token: str) -> Ingest:
        """Raises AuthenticationFailedError with the code `expired`, `invalid_signature` or `invalid_token`."""
        try:
            claims = jwt.decode(
                token,
                self._public,
                algorithms=[ALGORITHM],
                audience=INGEST,
                options={"require": ["exp", "iat", "aud"]},
            )
            return Ingest(UUID(claims["run_id"]), UUID(claims["task_id"]), int(claims["team_id"]))
        except jwt.ExpiredSignatureError:
            raise AuthenticationFailedError("The token has expired.", code="expired") from None
        except jwt.InvalidSignatureError:
            raise AuthenticationFailedError(
                "The token's signature is wrong.", code="invalid_signature"
            ) from None
        except (jwt.InvalidTokenError, KeyError, ValueError, TypeError, AttributeError):
            detail = "This is not a token for uploading events of a run."
            raise AuthenticationFailedError(detail, code="invalid_token") from None

    def _sign(self, claims: Mapping[str, Any], audience: str, lifetime_s: float) -> str:
        now = int(time.time())
        times = {"aud": audience, "iat": now, "exp": now + int(lifetime_s)}
        return jwt.encode({**claims, **times}, self._private, algorithm=ALGORITHM, headers={"kid": KEY_NAME})


def _claims(run: Row) -> dict[str, Any]:
    return {"run_id": str(run["id"]), "task_id": str(run["task_id"]), "team_id": run["project_id"]}


def _new_key() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
