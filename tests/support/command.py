"""Runs the `taskyard` command as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def taskyard(
    *words: str, cwd: Path, stdin: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """The finished command. Of the environment's settings it sees only those given here; data in `cwd`/data."""
    return subprocess.run(
        command_line(*words),
        cwd=cwd,
        env=_environment(cwd, env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def started(*words: str, cwd: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """The running command, with pipes; killed at the end if it still runs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command_line(*words),
        cwd=cwd,
        env=_environment(cwd, env),
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def command_line(*words: str) -> list[str]:
    """The command as it is installed here."""
    # Programs that a shell starts in the background ignore Ctrl-C, and so would this one.
    return ["env", "--default-signal=INT", sys.executable, "-m", "taskyard.cli", *words]


def _environment(cwd: Path, env: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TASKYARD_")}
    return kept | {"TASKYARD_DATA_DIR": str(cwd / "data"), "COLUMNS": "80"} | env
