"""`deploy/agent-image`: the recipe has what sandboxes need, at the versions that agents are installed in otherwise."""

from __future__ import annotations

import re
from pathlib import Path

from taskyard.agents.adapters import adapters
from taskyard.agents.install import NODE_MAJOR
from taskyard.sandbox.image_checks import PROGRAMS
from taskyard.settings import Settings
from tests.support.compose import DEPLOY

RECIPE = (DEPLOY / "agent-image" / "Dockerfile").read_text()
FROM_BASE = {"sh"}


def test_the_agents_are_those_of_the_adapters(tmp_path: Path) -> None:
    known = adapters(Settings(_env_file=None, data_dir=tmp_path)).values()
    packages = [adapter.package for adapter in known if adapter.package is not None]
    wanted = {f"{package.npm}@{package.version}" for package in packages}
    wanted.update(pin for package in packages for pin in package.pins)
    assert set(re.findall(r"@[a-z-]+/[a-z-]+@\S+", RECIPE)) == wanted
    assert len(wanted) >= 3


def test_node_is_new_enough() -> None:
    [version] = re.findall(r"^FROM node:(\d+)-", RECIPE, re.MULTILINE)
    assert int(version) >= NODE_MAJOR


def test_what_is_checked_is_installed() -> None:
    [listed] = re.findall(r"--no-install-recommends([^&]*)&&", RECIPE)
    missing = set(PROGRAMS) - FROM_BASE - set(listed.replace("\\", " ").split())
    assert missing == {"find", "du"}  # of findutils and, in every base, coreutils
    assert "findutils" in listed
