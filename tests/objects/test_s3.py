"""What is S3's own: encryption, addresses, credentials, failures."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from taskyard.objects.interface import SigningError, StorageError
from taskyard.objects.s3 import S3Store
from tests.support.s3 import BUCKET, s3_settings

NOBODY = "http://127.0.0.1:9"


async def test_encryption_is_asked_for() -> None:
    store = S3Store(s3_settings(NOBODY, encryption="aws:kms", kms_key_id="key-1"))
    fields = store.upload_form("", "a/b", 100).fields
    assert fields["x-amz-server-side-encryption"] == "aws:kms"
    assert fields["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1"
    conditions = json.loads(base64.b64decode(fields["policy"]))["conditions"]
    assert {"x-amz-server-side-encryption": "aws:kms"} in conditions
    assert {"x-amz-server-side-encryption-aws-kms-key-id": "key-1"} in conditions
    assert ["content-length-range", 0, 100] in conditions
    await store.close()


async def test_clients_get_the_public_address() -> None:
    store = S3Store(s3_settings(NOBODY, public_endpoint_url="https://files.example.org"))
    assert store.upload_form("", "a/b", 100).url == f"https://files.example.org/{BUCKET}"
    assert store.download_url("", "a/b").startswith(f"https://files.example.org/{BUCKET}/a/b?")
    await store.close()


async def test_amazon_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Store(s3_settings(NOBODY, endpoint_url=None, path_style=False, region="eu-central-1"))
    url = store.upload_form("", "a/b", 100).url
    assert url.startswith(f"https://{BUCKET}.s3.")
    assert "amazonaws.com" in url
    await store.close()


async def test_secret_from_a_file(tmp_path: Path, s3_url: str) -> None:
    from tests.support.s3_keeper import SECRET_KEY

    path = tmp_path / "secret"
    path.write_text(SECRET_KEY + "\n")
    store = S3Store(s3_settings(s3_url, secret_access_key=None, secret_access_key_file=path))
    await store.put("from-a-file", b"x", "text/plain")
    await store.delete(["from-a-file"])
    await store.close()
    path.unlink()
    with pytest.raises(SigningError, match="cannot be read"):
        S3Store(s3_settings(s3_url, secret_access_key=None, secret_access_key_file=path))


async def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = S3Store(s3_settings(NOBODY, access_key_id=None, secret_access_key=None))
    with pytest.raises(SigningError):
        store.upload_form("", "a", 1)
    with pytest.raises(SigningError):
        store.download_url("", "a")
    await store.close()


async def test_failures_are_errors_not_absence(s3_url: str) -> None:
    away = S3Store(s3_settings(NOBODY))
    wrong = S3Store(s3_settings(s3_url, secret_access_key="wrong"))
    missing = S3Store(s3_settings(s3_url, bucket="no-such-bucket"))
    for store in (away, wrong):
        with pytest.raises(StorageError):
            await store.head("a")
        with pytest.raises(StorageError):
            await store.open("a")
        with pytest.raises(StorageError):
            await store.put("a", b"x", "text/plain")
        with pytest.raises(StorageError):
            await store.delete(["a"])
    with pytest.raises(StorageError):
        await missing.open("a")
    for store in (away, wrong, missing):
        await store.close()
