"""What of a run's set-up can be told without a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskyard.drive.setup import _kind, spec_of
from taskyard.sandbox.provider import SandboxError
from taskyard.settings.sandboxes import DockerSettings, KubernetesSettings, SandboxSettings
from tests.conftest import make_settings


@pytest.mark.parametrize("provider", ["docker", "kubernetes"])
def test_layers_of_one_image_are_not_those_of_another(tmp_path: Path, provider: str) -> None:
    def kind(image: str, own: str | None = None) -> str:
        sandbox = SandboxSettings.model_validate({"provider": provider, provider: {"image": image}})
        return _kind(make_settings(tmp_path, "postgresql:///x", sandbox=sandbox), {"image": own})

    assert kind("one:1") != kind("one:2")
    assert kind("one:1", "own:1") == kind("one:2", "own:1") != kind("one:1", "own:2")


def test_images_of_other_providers_do_not_matter(tmp_path: Path) -> None:
    changed = SandboxSettings(docker=DockerSettings(image="x"), kubernetes=KubernetesSettings(image="y"))
    kinds = {
        _kind(make_settings(tmp_path, "postgresql:///x", sandbox=sandbox), {"image": None})
        for sandbox in (SandboxSettings(), changed)
    }
    assert len(kinds) == 1


def test_an_image_that_the_site_does_not_allow_any_more(tmp_path: Path) -> None:
    """Environments are older than settings: each run asks."""
    for images in (None, ["own:1"], ["own*"]):
        settings = make_settings(tmp_path, "postgresql:///x", sandbox=SandboxSettings(images=images))
        assert spec_of(settings, "run", {"image": "own:1"}).image == "own:1"
    settings = make_settings(tmp_path, "postgresql:///x", sandbox=SandboxSettings(images=[]))
    with pytest.raises(
        SandboxError, match="'own:1' is not one of those that this site allows for sandboxes: none"
    ):
        spec_of(settings, "run", {"image": "own:1"})
    assert spec_of(settings, "run", {"image": None}).image is None
    assert spec_of(settings, "run", None).image is None
