"""Settings of sandboxes and their providers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from taskyard.settings.area import Area

Capability = Literal[
    "memory",  # it ends what uses more memory than its limit
    "cpu",  # it holds processor time to its limit
    "pids",  # it holds the number of processes and threads
    "disk",  # it ends what fills more disk than its limit
    "kernel",  # it has a kernel of its own: a weakness of the host's does not open it
    "host-programs",  # it has the programs of the host
    "image",  # it is made of a container image
]
"""What a sandbox provider may be able to do on its host. That a sandbox has no network but the gateway is no choice."""


class DockerSettings(Area):
    """The container engine of the sandbox provider `docker`: Docker's, or Podman's by its Docker-compatible API."""

    host: str | None = None
    """Where it listens: `unix://PATH` or `tcp://HOST:PORT`; default: DOCKER_HOST, else
    `unix:///var/run/docker.sock`. For TLS: DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH, as for Docker's own client."""
    image: str = "taskyard-agent"
    """What sandboxes are made of whose environment names no image. Never pulled: it has to be there."""
    runtime: str | None = None
    """One that the engine knows, such as `runsc` (gVisor); default: the engine's."""
    files: Literal["mount", "copy"] | None = None
    """How sandboxes get the files they need of this host: mounted read-only, or copied in. Default: mounted if the
    host is a Unix socket. An engine behind such a socket may see other files, as when the server is in a container."""


class KubernetesSettings(Area):
    """Sandboxes as pods of a cluster (`docs/kubernetes.md`)."""

    namespace: str = Field("taskyard-sandboxes", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Where the pods are made."""
    image: str = "taskyard-agent"
    """What they are made of, unless a run asks for another image."""
    image_pull_secret: str | None = None
    """The name of a Secret of the namespace with which the image is fetched."""
    kubeconfig: Path | None = None
    """Default: the service account of the pod that the worker is in, else `~/.kube/config`."""
    context: str | None = None
    """Of the kubeconfig; default: its current one."""
    runtime_class: str | None = None
    """A RuntimeClass that gives pods a kernel of their own (gVisor, Kata)."""
    user_namespaces: bool = True
    """Pods get user namespaces of their own (`hostUsers: false`). Off only for clusters that cannot do that."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that take the pods."""
    start_s: float = Field(300, gt=0)
    """How long a pod may take to be ready: for a place on a node, and for its image to be fetched."""


class SandboxSettings(Area):
    """Limits of one sandbox."""

    provider: Literal["bubblewrap", "docker", "kubernetes"] = "bubblewrap"
    docker: DockerSettings = DockerSettings()
    uid_range: str = "230000-295535"
    """Host uids for sandboxes, one per run, `first-last`; used only when the server runs as root."""
    memory_mb: int = Field(16_384, gt=0)
    pids: int = Field(2048, gt=0)
    cpus: float = Field(4.0, gt=0)
    tmp_mb: int = Field(1024, gt=0)
    """Size of the sandbox's own temporary folder (memory)."""
    disk_mb: int = Field(20_480, ge=0)
    """What a run may keep in its workspace and home; each file counts 4 kB besides its content. 0: anything."""
    output_mb: int = Field(1024, ge=0)
    """What an agent, or a set-up script, may write to its standard output and error in all. 0: anything."""
    kubernetes: KubernetesSettings = KubernetesSettings()
    require: list[Capability] = []
    """What sandboxes must have: runs fail on a worker that cannot give it, instead of going without."""
    images: list[str] | None = None
    """Images that environments may name: whole names, or beginnings of names with a `*` behind. Unset: any."""

    def image_problem(self, image: str | None) -> str | None:
        """Why an environment may not name this image, as a sentence; None when it may."""
        if image is None or self.images is None:
            return None
        for one in self.images:
            if image == one or (one.endswith("*") and image.startswith(one[:-1])):
                return None
        known = ", ".join(self.images) or "none"
        return f"The image '{image}' is not one of those that this site allows for sandboxes: {known}."
