"""`python -m taskyard.cli` is `taskyard`."""

from taskyard.cli.main import run

run()
