"""A small file system of its own, which can be filled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mounted at a new folder, with the size as mount has it; the test is skipped for who may not mount."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free; the file that takes them all."""
    path = disk / "ballast"
    with path.open("wb") as file:
        found = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize)
    return path
