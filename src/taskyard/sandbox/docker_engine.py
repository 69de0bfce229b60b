"""The container engine: Docker's, or Podman's by its Docker-compatible API, and its errors in words of ours."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiodocker
import aiohttp
from aiodocker.volumes import DockerVolume

from taskyard.errors import SetupError
from taskyard.sandbox.provider import AwayError
from taskyard.settings.sandboxes import DockerSettings

TALK_S = 60.0
"""The engine answers anything within this time."""
SAID_CHARS = 500
DEFAULT_HOST = "unix:///var/run/docker.sock"
_NOBODY = 900
"""What aiodocker has as the status when there is no engine."""
_PAUSE_S = 0.1

Json = dict[str, Any]


class EngineError(AwayError):
    """The engine did not do what it was asked."""

    def __init__(self, detail: str, *, missing: bool = False) -> None:
        super().__init__(detail)
        self.missing = missing
        """It does not have what it was asked about."""


@dataclass(frozen=True)
class Facts:
    """What the engine says of itself."""

    version: str
    cpus: int
    folder: Path
    """Where it keeps its data, on its host."""
    limits: frozenset[str]
    """Of `memory`, `cpu`, `pids`: what it can limit."""
    runtimes: frozenset[str]
    podman: bool


@dataclass(frozen=True)
class Labelled:
    """A container or volume."""

    id: str
    labels: Mapping[str, str]


class Engine:
    """One connection pool to the engine. Made and used in one event loop."""

    def __init__(self, settings: DockerSettings) -> None:
        self.host = settings.host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
        self.here = self.host.startswith("unix://")
        """Whether it is on this host."""
        self._client: aiodocker.Docker | None = None
        self._facts: Facts | None = None

    @property
    def client(self) -> aiodocker.Docker:
        """Raises SetupError for a host that cannot be."""
        if self._client is None:
            try:
                self._client = _client(self.host)
            except (ValueError, OSError) as error:
                raise SetupError(f"the container engine at {self.host} cannot be used: {error}") from error
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            await self._client.session.close()
            self._client = None

    @asynccontextmanager
    async def asked(self, what: str) -> AsyncIterator[aiodocker.Docker]:
        """For calls of the engine; `what` it is asked to do. Raises EngineError for all that goes wrong."""
        try:
            async with asyncio.timeout(TALK_S):
                yield self.client
        except aiodocker.DockerError as error:
            if error.status == _NOBODY:
                raise EngineError(f"the container engine at {self.host} does not answer") from error
            # Some repeat all that they were told.
            detail = f"the container engine does not {what}: {error.message.strip()[:SAID_CHARS]}"
            raise EngineError(detail, missing=error.status == 404) from error
        except TimeoutError as error:
            detail = f"the container engine has not answered for {TALK_S:g} seconds, asked to {what}"
            raise EngineError(detail) from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"the container engine at {self.host} broke off: {error}") from error

    async def facts(self) -> Facts:
        """Asked for once. Raises SetupError when it does not answer."""
        if self._facts is None:
            try:
                async with self.asked("describe itself") as client:
                    found = dict(await client.system.info())
                    parts = (await client.version()).get("Components") or ()
            except EngineError as error:
                raise SetupError(
                    f"{error.detail}. Start it, or name another in TASKYARD_SANDBOX__DOCKER__HOST or DOCKER_HOST; the"
                    " server's user needs access to its socket"
                ) from error
            names = {"memory": "MemoryLimit", "cpu": "CpuCfsQuota", "pids": "PidsLimit"}
            self._facts = Facts(
                version=str(found.get("ServerVersion")),
                cpus=int(found.get("NCPU") or 1),
                folder=Path(str(found.get("DockerRootDir") or "/")),
                limits=frozenset(name for name, key in names.items() if found.get(key)),
                runtimes=frozenset(found.get("Runtimes") or ()),
                podman=any(part.get("Name") == "Podman Engine" for part in parts),
            )
        return self._facts

    async def image(self, name: str) -> Json:
        """What the engine knows of an image. Raises EngineError, `missing` when it is not there."""
        async with self.asked(f"look at the image {name}") as client:
            return dict(await client.images.inspect(name))

    async def containers(self, labels: Mapping[str, str]) -> list[Labelled]:
        """Containers with all these labels, whatever their state."""
        filters = json.dumps(_filter(labels))
        async with self.asked("list containers") as client:
            found = await client.containers.list(all="true", filters=filters)
        return [Labelled(container.id, container["Labels"] or {}) for container in found]

    async def volumes(self, labels: Mapping[str, str]) -> list[Labelled]:
        """Volumes with all these labels; their ids are their names."""
        async with self.asked("list volumes") as client:
            found = await client.volumes.list(filters=_filter(labels))
        return [Labelled(volume["Name"], volume["Labels"] or {}) for volume in found["Volumes"] or ()]

    async def remove_container(self, container_id: str) -> None:
        """Kill and remove it, with its nameless volumes; returns when it is gone. Idempotent."""
        async with self.asked("remove a container") as client:
            container = client.containers.container(container_id)
            while True:
                try:
                    await container.delete(force=True, v=True)
                except aiodocker.DockerError as error:
                    if error.status == 404:
                        return
                    if error.status != 409:
                        raise
                    await asyncio.sleep(_PAUSE_S)  # somebody else removes it: until that is done

    async def remove_volume(self, name: str) -> None:
        """Idempotent."""
        async with self.asked("remove a volume") as client:
            try:
                await DockerVolume(client, name).delete(force=True)
            except aiodocker.DockerError as error:
                if error.status != 404:
                    raise


def _filter(labels: Mapping[str, str]) -> dict[str, list[str]]:
    return {"label": [f"{name}={value}" for name, value in labels.items()]}


def _client(host: str) -> aiodocker.Docker:
    """aiodocker's own connector allows 100 connections at once, and each command in a sandbox is one."""
    scheme, _, rest = host.partition("://")
    match scheme:
        case "unix":
            connector: aiohttp.BaseConnector = aiohttp.UnixConnector(rest, limit=0)
            url = "unix://localhost"
        case "tcp" | "http" | "https":
            secure = scheme == "https" or bool(os.environ.get("DOCKER_TLS_VERIFY"))
            connector = aiohttp.TCPConnector(ssl=_tls() if secure else True, limit=0, socket_factory=_socket)
            url = f"{'https' if secure else 'http'}://{rest}"
        case _:
            raise ValueError("a host begins with unix://, tcp:// or https://")
    session = aiohttp.ClientSession(connector=connector)
    return aiodocker.Docker(url=url, connector=connector, session=session)


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """One that notices within two minutes that the other host is gone: a stream may be silent for hours."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _tls() -> ssl.SSLContext:
    """Certificates as Docker's own client finds them."""
    folder = Path(os.environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker")
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    with suppress(FileNotFoundError):
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
