"""Objects on an S3-compatible server.

Signing is arithmetic and happens at once; everything else blocks, and runs in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from taskyard.objects.interface import (
    CHUNK_BYTES,
    DEFAULT_TYPE,
    VALID_S,
    Content,
    Form,
    SigningError,
    StorageError,
    Stored,
)
from taskyard.settings import S3Settings

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

log = structlog.get_logger()
T = TypeVar("T")

DELETE_MANY = 1000
"""Keys that one request may delete."""
MISSING = frozenset({"404", "NoSuchKey", "NotFound"})


class S3Store:
    """One bucket, which has to exist. `origin` is not used: clients talk to the S3 server directly."""

    def __init__(self, settings: S3Settings) -> None:
        """Raises SigningError when the file of the secret key cannot be read."""
        assert settings.bucket is not None
        self._bucket = settings.bucket
        session = _session(settings)
        self._client = _client(session, settings, settings.endpoint_url)
        public = settings.public_endpoint_url
        self._signing = _client(session, settings, public) if public else self._client
        self._has_credentials = session.get_credentials() is not None
        self._encryption: dict[str, str] = {}
        if settings.encryption is not None:
            self._encryption["x-amz-server-side-encryption"] = settings.encryption
        if settings.kms_key_id is not None:
            self._encryption["x-amz-server-side-encryption-aws-kms-key-id"] = settings.kms_key_id
        self._put_options: dict[str, Any] = {
            name: value
            for name, value in (
                ("ServerSideEncryption", settings.encryption),
                ("SSEKMSKeyId", settings.kms_key_id),
            )
            if value is not None
        }

    def upload_form(
        self,
        origin: str,
        key: str,
        max_bytes: int,
        *,
        valid_s: int = VALID_S,
        content_type: str | None = None,
    ) -> Form:
        fields = dict(self._encryption) | ({} if content_type is None else {"Content-Type": content_type})
        conditions: list[Any] = [{name: value} for name, value in fields.items()]
        conditions.append(["content-length-range", 0, max_bytes])
        made = self._signed(
            lambda: self._signing.generate_presigned_post(
                self._bucket, key, Fields=fields, Conditions=conditions, ExpiresIn=valid_s
            )
        )
        return Form(made["url"], made["fields"])

    def download_url(
        self,
        origin: str,
        key: str,
        *,
        valid_s: int = VALID_S,
        disposition: str | None = None,
        content_type: str | None = None,
    ) -> str:
        params: dict[str, Any] = {"Bucket": self._bucket, "Key": key}
        if disposition is not None:
            params["ResponseContentDisposition"] = disposition
        if content_type is not None:
            params["ResponseContentType"] = content_type
        return self._signed(
            lambda: self._signing.generate_presigned_url("get_object", Params=params, ExpiresIn=valid_s)
        )

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        await _thread(
            lambda: self._client.put_object(
                Bucket=self._bucket, Key=key, Body=data, ContentType=content_type, **self._put_options
            )
        )

    async def put_file(self, key: str, path: Path, content_type: str) -> None:
        def send() -> None:
            with path.open("rb") as file:
                self._client.put_object(
                    Bucket=self._bucket, Key=key, Body=file, ContentType=content_type, **self._put_options
                )

        await _thread(send)

    async def head(self, key: str) -> Stored | None:
        found = await _existing(lambda: self._client.head_object(Bucket=self._bucket, Key=key))
        if found is None:
            return None
        return Stored(found.get("ContentLength"), found.get("ContentType") or DEFAULT_TYPE)

    async def open(self, key: str, *, start: int = 0) -> Content | None:
        def get() -> Any:
            if start:  # of an empty object there is no part
                return self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-")
            return self._client.get_object(Bucket=self._bucket, Key=key)

        found = await _existing(get)
        return None if found is None else Content(found["ContentLength"], _chunks(found["Body"]))

    async def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), DELETE_MANY):
            await self._delete(keys[start : start + DELETE_MANY])

    def _signed(self, sign: Callable[[], T]) -> T:
        try:
            if not self._has_credentials:  # the library notices it late, or not at all
                raise NoCredentialsError
            return sign()
        except (BotoCoreError, ClientError) as error:
            log.warning("cannot sign for the object storage", error=str(error))
            raise SigningError from error

    async def _delete(self, keys: Sequence[str]) -> None:
        answer = await _thread(
            lambda: self._client.delete_objects(
                Bucket=self._bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
        )
        if errors := answer.get("Errors"):
            log.error("cannot delete objects", count=len(errors), first=errors[0].get("Message"))
            raise StorageError

    async def tidy(self) -> None:
        """The server removes by itself what broken uploads left."""

    async def close(self) -> None:
        self._client.close()
        self._signing.close()


def _session(settings: S3Settings) -> boto3.Session:
    try:
        secret = settings.secret()
    except OSError as error:
        raise SigningError(f"The secret key of the object storage cannot be read: {error}") from error
    return boto3.Session(
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=secret,
        region_name=settings.region,
    )


def _client(session: boto3.Session, settings: S3Settings, endpoint_url: str | None) -> S3Client:
    return session.client(
        "s3",
        endpoint_url=endpoint_url,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if settings.path_style else "auto"},
            connect_timeout=5,
            read_timeout=30,
            retries={"total_max_attempts": 3, "mode": "standard"},
            # Many compatible servers do not know the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


async def _thread(work: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(work)
    except (BotoCoreError, ClientError) as error:
        # The cause may name hosts and keys: it is for the log only.
        log.warning("the object storage failed", error=str(error))
        raise StorageError from error


async def _existing(work: Callable[[], T]) -> T | None:
    """The answer about an object; None when there is no such object."""

    def look() -> T | None:
        try:
            return work()
        except ClientError as error:
            if error.response["Error"].get("Code") in MISSING:
                return None
            raise

    return await _thread(look)


async def _chunks(body: Any) -> AsyncGenerator[bytes, None]:
    try:
        while data := await _thread(lambda: body.read(CHUNK_BYTES)):
            yield data
    finally:
        body.close()
