"""A full disk is told from other failures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from taskyard.drive.space import no_space


@pytest.mark.parametrize(
    ("said", "full"),
    [
        ("fatal: write error: No space left on device", True),
        ("error: failed to write new configuration file /tmp/x/.git/config.lock", True),
        ("fatal: repository not found", False),
    ],
)
def test_by_its_words(tmp_path: Path, said: str, full: bool) -> None:
    assert no_space(tmp_path, said) is full


def test_by_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert no_space(tmp_path, "fatal: index-pack failed")
