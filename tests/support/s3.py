"""A real S3-compatible server for tests: one for each test process, started when first asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from taskyard.settings import S3Settings
from tests.support import s3_keeper

BUCKET = "artifacts"


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a SeaweedFS server with one bucket."""
    folder = tmp_path_factory.mktemp("seaweedfs") / "data"
    command = [sys.executable, s3_keeper.__file__, str(folder)]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with keeper:  # leaving closes the pipes and waits
        assert keeper.stdout is not None
        url = keeper.stdout.readline().strip()
        assert url, "SeaweedFS did not start: see above"
        client: Any = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=s3_keeper.ACCESS_KEY,
            aws_secret_access_key=s3_keeper.SECRET_KEY,
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield url


def s3_settings(url: str, **changes: Any) -> S3Settings:
    values = {
        "bucket": BUCKET,
        "endpoint_url": url,
        "path_style": True,
        "access_key_id": s3_keeper.ACCESS_KEY,
        "secret_access_key": s3_keeper.SECRET_KEY,
    }
    return S3Settings(**{**values, **changes})
