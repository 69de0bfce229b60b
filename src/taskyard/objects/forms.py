"""Signed forms and URLs of the local store, after the manner of S3.

A form carries a policy, which is base64 of JSON: when it expires, and a condition for every field that it may have.
The signature is over the policy's text, so nothing else of the form has to be signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

ALGORITHM = "TASKYARD-HMAC-SHA256"
UNCHECKED = frozenset({"policy", "x-amz-algorithm", "x-amz-signature", "file"})
"""Fields that need no condition."""


class RefusedError(Exception):
    """A request that the storage refuses, in the words of S3: HTTP status, code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def denied(message: str) -> RefusedError:
    return RefusedError(403, "AccessDenied", message)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a checked form allows."""

    key: str
    min_bytes: int
    max_bytes: int
    content_type: str | None


class FormSigner:
    """Signs and checks with a key that all processes of a site share."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def fields(self, key: str, max_bytes: int, valid_s: int, content_type: str | None) -> dict[str, str]:
        """The fields of a form for one key, in their order."""
        expires = datetime.fromtimestamp(time.time() + valid_s, UTC)
        named = {"key": key} | ({} if content_type is None else {"Content-Type": content_type})
        conditions: list[Any] = [{name: value} for name, value in named.items()]
        conditions.append(["content-length-range", 0, max_bytes])
        document = {"expiration": expires.isoformat(), "conditions": conditions}
        policy = base64.b64encode(json.dumps(document).encode()).decode()
        signed = {
            "x-amz-algorithm": ALGORITHM,
            "policy": policy,
            "x-amz-signature": self._sign("form", policy),
        }
        return named | signed

    def check(self, fields: Mapping[str, str]) -> Allowed:
        """What the fields of a sent form allow. Raises RefusedError."""
        policy = fields.get("policy", "")
        if not policy:
            raise denied("The form has no policy.")
        if not self._matches(self._sign("form", policy), fields.get("x-amz-signature", "")):
            raise RefusedError(403, "SignatureDoesNotMatch", "The signature does not match the policy.")
        try:
            document = json.loads(base64.b64decode(policy, validate=True))
        except (binascii.Error, ValueError):
            raise RefusedError(400, "InvalidPolicyDocument", "The policy is no base64 of JSON.") from None
        if datetime.fromisoformat(document["expiration"]) <= datetime.now(UTC):
            raise denied("Invalid according to Policy: Policy expired.")
        wanted: dict[str, str] = {}
        least, most = 0, 0
        for condition in document["conditions"]:
            if isinstance(condition, dict):
                wanted |= condition
            else:
                _, least, most = condition
        for name, value in wanted.items():
            if fields.get(name) != value:
                raise denied(f'Invalid according to Policy: Policy Condition failed: ["eq", "${name}"]')
        if extra := sorted(fields.keys() - wanted.keys() - UNCHECKED):
            raise denied(f"Invalid according to Policy: Extra input fields: {', '.join(extra)}")
        return Allowed(wanted["key"], least, most, wanted.get("Content-Type"))

    def query(self, key: str, valid_s: int, disposition: str | None, content_type: str | None) -> str:
        """The query of a URL that reads an object."""
        overrides = {"response-content-disposition": disposition, "response-content-type": content_type}
        given = {name: value for name, value in overrides.items() if value is not None}
        params = given | {"expires": str(int(time.time()) + valid_s)}
        return urlencode(params | {"signature": self._sign("url", _subject(key, params))})

    def check_query(self, key: str, query: Mapping[str, str]) -> None:
        """Raises RefusedError unless the query was made by `query` for this key, and has not expired."""
        params = {name: value for name, value in query.items() if name != "signature"}
        if not self._matches(self._sign("url", _subject(key, params)), query.get("signature", "")):
            raise RefusedError(403, "SignatureDoesNotMatch", "The signature does not match the request.")
        if int(params["expires"]) <= time.time():
            raise denied("Request has expired.")

    def _sign(self, kind: str, subject: str) -> str:
        return hmac.new(
            self._key, f"{kind}\n{subject}".encode("utf-8", "surrogatepass"), hashlib.sha256
        ).hexdigest()

    @staticmethod
    def _matches(made: str, given: str) -> bool:
        return hmac.compare_digest(made.encode(), given.encode("utf-8", "surrogatepass"))


def _subject(key: str, params: Mapping[str, str]) -> str:
    """Everything that a URL says, unambiguously."""
    return json.dumps([key, sorted(params.items())])
