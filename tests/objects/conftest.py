"""Both object stores under test: the local one behind its routes, and a real S3-compatible server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from litestar import Litestar
from litestar.datastructures import State

from taskyard.objects.api import download, upload
from taskyard.objects.forms import FormSigner
from taskyard.objects.interface import Form, ObjectStore
from taskyard.objects.local import LocalStore
from taskyard.objects.s3 import S3Store
from taskyard.serve import Server
from tests.support.s3 import s3_settings


@dataclass
class Site:
    """A store, and a client without credentials."""

    kind: str
    store: ObjectStore
    origin: str
    client: httpx.AsyncClient

    async def send(
        self,
        form: Form,
        data: bytes,
        *,
        name: str = "file.bin",
        content_type: str = "application/octet-stream",
        fields: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Post a form as clients do: its fields, the file last."""
        sent = form.fields if fields is None else fields
        return await self.client.post(form.url, data=sent, files={"file": (name, data, content_type)})

    async def read(self, key: str) -> bytes | None:
        """What the server itself reads under a key."""
        content = await self.store.open(key)
        return None if content is None else b"".join([chunk async for chunk in content.chunks])


@asynccontextmanager
async def serving(store: LocalStore) -> AsyncIterator[str]:
    """The HTTP side of a local store on a free port; its address."""
    app = Litestar([upload, download], state=State({"objects": store}), openapi_config=None)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False)
    server = Server(config)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(60):
        await server.listening.wait()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects", FormSigner(b"k" * 32))


@pytest.fixture(params=["local", "s3"])
async def site(request: pytest.FixtureRequest, local: LocalStore) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60.0, trust_env=False))
        if request.param == "local":
            yield Site("local", local, await stack.enter_async_context(serving(local)), client)
        else:
            store = S3Store(s3_settings(request.getfixturevalue("s3_url")))
            stack.push_async_callback(store.close)
            yield Site("s3", store, "http://unused.invalid", client)
