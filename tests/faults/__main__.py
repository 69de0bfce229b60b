"""`python -m tests.faults [--seed N] [--kills N] [--runs N]`: a long storm. Ends with status 1 if anything is wrong."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from tests.faults.storm import lower_priority, storm

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="scripts/faults", description="A site under random faults.")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="repeats a storm")
    parser.add_argument("--kills", type=int, default=200, help="how many faults")
    parser.add_argument("--runs", type=int, default=5, help="runs at any time")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="an empty folder; kept, with the logs of all processes")
    words = parser.parse_args()
    lower_priority()
    folder = words.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(exist_ok=True)
    report = asyncio.run(storm(folder, words.seed, words.kills, at_once=words.runs, workers=words.workers))
    print(report.text())
    print(f"logs: {folder}")
    sys.exit(1 if report.wrong else 0)
