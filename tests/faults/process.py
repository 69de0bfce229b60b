"""`taskyard` with a shorter lease, so that a storm has many takeovers: `python -m tests.faults.process WORDS`.

The tests of the lease itself use the real one; here only its length is another.
"""

from __future__ import annotations

import os

from taskyard import dispatch, sweep
from taskyard.runs import store

if __name__ == "__main__":
    store.LEASE_S = int(os.environ["FAULTS_LEASE_S"])
    dispatch.SWEEP_S = store.LEASE_S / 4
    sweep.SWEEP_S = 15.0
    from taskyard.cli.main import run

    run()
