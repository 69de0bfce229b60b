"""Tries out the bucket of the settings the way the server and its clients use it."""

from __future__ import annotations

from uuid import uuid4

import httpx

from taskyard.objects.interface import DEFAULT_TYPE, ObjectStore, StorageError
from taskyard.settings import ObjectSettings

DATA = b"taskyard doctor"


async def trial(settings: ObjectSettings) -> str | None:
    """What the bucket refuses, in a sentence; None when it can be written, read, and used by signed forms and URLs.

    Two small objects are made and removed again.
    """
    from taskyard.objects.s3 import S3Store

    step = "it cannot be signed for"
    try:
        store = S3Store(settings.s3)
        keys = [f"{settings.folder}/doctor/{uuid4().hex}" for _ in range(2)]
        try:
            form = store.upload_form("", keys[0], 1000)
            step = "it cannot be written"
            await store.put(keys[1], DATA, DEFAULT_TYPE)
            step = "it cannot be read"
            if await store.head(keys[1]) is None:
                return f"{step}: what was just written is not there"
            step = f"clients cannot upload to {form.url}"
            async with httpx.AsyncClient(timeout=30) as client:
                sent = await client.post(form.url, data=form.fields, files={"file": ("file", DATA)})
                if not sent.is_success:
                    return f"{step}: {_said(sent)}"
                step = "clients cannot download"
                got = await client.get(store.download_url("", keys[0]))
                if got.content != DATA:
                    return f"{step}: {_said(got)}"
            step = "objects cannot be removed"
        finally:
            await _remove(store, keys)
    except (StorageError, httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{step}: {error.__cause__ or error or type(error).__name__}"
    return None


async def _remove(store: ObjectStore, keys: list[str]) -> None:
    try:
        await store.delete(keys)
    finally:
        await store.close()


def _said(response: httpx.Response) -> str:
    return f"{response.status_code} {response.text[:300]}"
