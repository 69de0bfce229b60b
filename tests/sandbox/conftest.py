"""Real sandboxes. They run as root (a uid for each sandbox) and as an ordinary user alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskyard.sandbox.bubblewrap import BubblewrapSandbox
from tests.support.sandboxes import Hut


@pytest.fixture
async def hut(tmp_path: Path) -> AsyncIterator[Hut]:
    hut = Hut(tmp_path / "data")
    yield hut
    await hut.close()


@pytest.fixture
async def sandbox(hut: Hut) -> BubblewrapSandbox:
    return await hut.sandbox()
