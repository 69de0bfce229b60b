"""The Kubernetes provider on the stand-in of a cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.kubernetes import KubernetesProvider
from taskyard.settings import Settings
from taskyard.settings.sandboxes import KubernetesSettings, SandboxSettings
from tests.support.kube_api import NAMESPACE, KubeApi, open_api
from tests.support.sandboxes import AnyHut

START_S = 60.0


class KubeHut(AnyHut):
    """A provider, and the cluster that it works on."""

    provider: KubernetesProvider

    def __init__(self, folder: Path, provider: KubernetesProvider, api: KubeApi) -> None:
        super().__init__(folder, provider)
        self.api = api
        self.limits_memory = api.limits_memory


def kube_settings(api: KubeApi, **fields: Any) -> SandboxSettings:
    values: dict[str, Any] = {"namespace": NAMESPACE, "kubeconfig": api.kubeconfig(), "start_s": START_S}
    return SandboxSettings(provider="kubernetes", kubernetes=KubernetesSettings(**{**values, **fields}))


@asynccontextmanager
async def open_kube_hut(folder: Path, **fields: Any) -> AsyncIterator[KubeHut]:
    """A provider of its own cluster. fields: settings of sandbox.kubernetes."""
    async with open_api(folder.with_name(f"{folder.name}-cluster")) as api:
        settings = Settings(_env_file=None, data_dir=folder, sandbox=kube_settings(api, **fields))
        provider = KubernetesProvider(settings)
        # A local disk is looked at each second; that of a node, as if it were.
        provider.disk = DiskWatch(None, rest_s=1.0)
        hut = KubeHut(folder, provider, api)
        try:
            yield hut
        finally:
            await hut.close()
