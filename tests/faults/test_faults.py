"""A short storm; `scripts/faults` is the long one."""

from __future__ import annotations

import os
from pathlib import Path

from tests.faults.storm import storm

SEED = int(os.environ.get("TASKYARD_TEST_FAULTS_SEED", "1"))
KILLS = 25


async def test_a_short_storm(tmp_path: Path) -> None:
    report = await storm(tmp_path, SEED, KILLS, at_once=3, workers=2)
    assert not report.wrong, report.text()
    assert report.runs >= 3, report.text()
