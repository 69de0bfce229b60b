"""Which sandbox provider the settings name."""

from __future__ import annotations

from taskyard.sandbox.provider import Provider
from taskyard.settings import Settings


def provider_for(settings: Settings) -> Provider:
    """The provider, not yet checked. Raises SetupError for settings that it cannot work with."""
    match settings.sandbox.provider:
        case "bubblewrap":
            from taskyard.sandbox.bubblewrap import BubblewrapProvider

            return BubblewrapProvider(settings)
        case "docker":
            from taskyard.sandbox.docker import DockerProvider

            return DockerProvider(settings)
        case "kubernetes":
            from taskyard.sandbox.kubernetes import KubernetesProvider

            return KubernetesProvider(settings)
