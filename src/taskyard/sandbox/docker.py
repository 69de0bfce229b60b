"""The provider for container engines: each command is the main process of a container of its own, over two volumes.

Not an `exec` in one lasting container: what such a thing leaves running, and what it costs in memory, the engine
tells of a container only, and an exec goes on when its connection is gone. The carrier in the container ends
with its standard input, so nothing outlives the server; containers that are left are removed by the sweep.

Files of this host are mounted if the engine is here, else copied in (docker_files.py).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from taskyard.errors import SetupError
from taskyard.sandbox import docker_checks, docker_config, docker_files, seccomp
from taskyard.sandbox.carried import Wire
from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.docker_config import PLACE, SANDBOX, Json, Volumes
from taskyard.sandbox.docker_engine import Engine, EngineError, Facts
from taskyard.sandbox.docker_wire import ContainerWire
from taskyard.sandbox.hold import Hold
from taskyard.sandbox.provider import Mount, Problem, SandboxError, Spec
from taskyard.sandbox.remote import RemoteProvider, RemoteSandbox
from taskyard.settings import Settings
from taskyard.settings.sandboxes import Capability

_OWN_KERNEL = ("runsc", "kata", "io.containerd.runsc", "io.containerd.kata")
"""How the names of runtimes begin that give a container a kernel of its own."""


class DockerProvider(RemoteProvider):
    """See provider.Provider."""

    name = "docker"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.settings = settings.sandbox.docker
        self.engine = Engine(self.settings)
        self.copies = self.settings.files == "copy" or (self.settings.files is None and not self.engine.here)
        self._facts: Facts | None = None
        self.seccomp = ""
        """The system-call filter as this engine takes it, once capabilities() was asked."""
        self._disk: DiskWatch | None = None

    @property
    def own_kernel(self) -> bool:
        """Whether sandboxes do not share the kernel of the engine's host."""
        return (self.settings.runtime or "").startswith(_OWN_KERNEL)

    @property
    def facts_of_engine(self) -> Facts:
        assert self._facts is not None, "capabilities() comes first"
        return self._facts

    async def capabilities(self) -> frozenset[Capability]:
        """See provider.Provider."""
        if self._facts is None:
            facts = await self.engine.facts()
            runtime = self.settings.runtime
            if runtime is not None and runtime not in facts.runtimes:
                known = ", ".join(sorted(facts.runtimes)) or "none"
                raise SetupError(
                    f"the container engine has no runtime {runtime!r}, only: {known}; see its configuration, or"
                    " TASKYARD_SANDBOX__DOCKER__RUNTIME"
                )
            self.seccomp = self._seccomp_of(facts)
            self._facts = facts
        able: set[Capability] = {"disk", "image"}
        able.update(name for name in ("memory", "cpu", "pids") if name in self._facts.limits)
        if self.own_kernel:
            able.add("kernel")
        return frozenset(able)

    def _seccomp_of(self, facts: Facts) -> str:
        """Docker takes the filter itself, Podman the path of a file on its own host. Raises SetupError."""
        text = json.dumps(seccomp.profile())
        if not facts.podman:
            return text
        if not self.engine.here:
            raise SetupError(
                f"Podman at {self.engine.host} has to be on this host, behind a Unix socket: it reads the system-call"
                " filter of sandboxes from a file; on other hosts use Docker's engine, or a worker there"
            )
        path = self.data_dir / "seccomp.json"
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_name(f"seccomp.{secrets.token_hex(6)}.part")
        part.write_text(text, "ascii")
        part.replace(path)
        return str(path)

    async def check(self) -> list[Problem]:
        """See provider.Provider."""
        return await docker_checks.check(self)

    async def close(self) -> None:
        """See provider.Provider."""
        if self._disk is not None:
            await self._disk.close()
        await self.engine.close()

    async def create(self, spec: Spec) -> RemoteSandbox:
        await self.capabilities()
        await self.image(spec.image or self.settings.image)
        return await super().create(spec)

    def sandbox(self, hold: Hold, mounts: Sequence[Mount] = ()) -> RemoteSandbox:
        if self._disk is None:
            folder = self.facts_of_engine.folder
            self._disk = DiskWatch(folder if self.engine.here and folder.is_dir() else None)
        return DockerSandbox(self, hold, self._disk, mounts)

    async def engine_has(self) -> set[str]:
        ours = {PLACE: self.place}
        found = [*await self.engine.containers(ours), *await self.engine.volumes(ours)]
        return {each.labels[SANDBOX] for each in found if SANDBOX in each.labels}

    async def remove_rest(self, sandbox_id: str) -> None:
        marks = docker_config.labels(self.place, sandbox_id)
        for container in await self.engine.containers(marks):
            await self.engine.remove_container(container.id)
        for volume in await self.engine.volumes(marks):
            await self.engine.remove_volume(volume.id)

    async def image(self, name: str) -> Json:
        """What the engine knows of an image. Raises SandboxError, which says what to do when it is not there."""
        try:
            return await self.engine.image(name)
        except EngineError as error:
            if not error.missing:
                raise
            raise SandboxError(
                f"the container engine has no image {name!r}, and none is ever pulled: {how_to_get(name)}"
            ) from error


class DockerSandbox(RemoteSandbox):
    """See provider.Sandbox. Made by DockerProvider."""

    def __init__(
        self, provider: DockerProvider, hold: Hold, disk: DiskWatch, mounts: Sequence[Mount] = ()
    ) -> None:
        super().__init__(hold, disk, mounts)
        self._provider = provider
        self._engine = provider.engine
        self._image = str(hold.facts.get("image") or provider.settings.image)
        self._marks = docker_config.labels(provider.place, self.id)
        self._volumes = Volumes.of(provider.place, self.id)
        self._declared: tuple[str, ...] | None = None
        """Where its image wants volumes, once that was asked."""

    async def make(self) -> None:
        # The engine takes a volume that is there for a new one, with what somebody left in it.
        await self.remove_all()
        for name in self._volumes.names:
            async with self._engine.asked("make a volume") as client:
                await client.volumes.create(docker_config.volume(name, self._marks))
        limits = self.hold.limits
        assert limits is not None
        image = self._provider.settings.image
        await self._provider.image(image)
        config = docker_config.giver(
            image,
            self._provider.seccomp,
            self._marks,
            self._volumes,
            limits,
            self._provider.facts_of_engine.cpus,
        )
        async with self._engine.asked("make the volumes of a sandbox usable") as client:
            container = await client.containers.create(config)
            await container.start()
            status = int((await container.wait())["StatusCode"])
        await self._engine.remove_container(container.id)
        if status != 0:
            raise SandboxError(
                f"the volumes of a sandbox cannot be given to its user: chown in {image!r} ended with {status}"
            )

    async def take_over(self) -> None:
        for container in await self._engine.containers(self._marks):
            await self._engine.remove_container(container.id)
        names = {volume.id for volume in await self._engine.volumes(self._marks)}
        if not names.issuperset(self._volumes.names):
            self.hold.limits = None

    async def open_wire(self, mounts: Sequence[Mount], seconds: float | None) -> Wire:
        limits = self.hold.limits
        assert limits is not None
        files = docker_files.plan(mounts, copies=self._provider.copies)
        if self._declared is None:
            image = await self._provider.image(self._image)
            self._declared = tuple((image.get("Config") or {}).get("Volumes") or ())
        config = docker_config.carrier(
            self._image,
            self._provider.seccomp,
            self._marks,
            self._volumes,
            limits,
            cpus=self._provider.facts_of_engine.cpus,
            runtime=self._provider.settings.runtime,
            mounts=files.mounts,
            declared=self._declared,
        )
        async with self._engine.asked("make a container") as client:
            container = await client.containers.create(config)
        wire = ContainerWire(self._engine, container)
        try:
            for copy in files.copies:
                await docker_files.bring(self._engine, container, copy, self.scratch)
            await wire.start()
        except BaseException:
            await wire.kill()
            raise
        return wire

    async def remove_all(self) -> None:
        await self._provider.remove_rest(self.id)


def how_to_get(image: str) -> str:
    """What to do about an image that is not there."""
    return (
        f"build it on the engine's host (`docker build -t {image} deploy/agent-image`, see docs/sandboxes.md), or"
        " load one (`docker load`, `docker pull`), or name another"
    )
