"""The command as a whole: help, start, usage and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import taskyard

COMMANDS = (
    "serve",
    "api",
    "worker",
    "run",
    "follow",
    "cancel",
    "demo",
    "doctor",
    "config",
    "agents",
    "admin",
    "sandbox",
)


def test_help_names_every_command(tmp_path: Path) -> None:
    done = taskyard("--help", cwd=tmp_path)
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].strip().splitlines()]
    assert tuple(listed) == COMMANDS
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_starts_without_what_it_does_not_need() -> None:
    """The slow libraries are imported by the commands that use them."""
    program = (
        "import sys, taskyard.cli.main\n"
        "slow = {'httpx', 'pydantic', 'rich.console', 'sqlalchemy', 'litestar', 'psycopg', 'asyncio'}\n"
        "print(*sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_version(tmp_path: Path) -> None:
    assert taskyard("--version", cwd=tmp_path).stdout == "taskyard 0.1.0\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Commands:"),
        (("nonsense",), "No such command 'nonsense'"),
        (("run",), "Missing argument"),
        (("run", "x", "--frob"), "No such option"),
        (("run", "  "), "the prompt is empty"),
        (("run", "x", "--model", "m"), "--model needs --agent claude or --agent codex"),
        (("run", "x", "--model", "m", "--agent", "scripted"), "--model needs --agent"),
        (("run", "x", "--follow", "--json"), "exclude each other"),
        (("serve", "--port", "70000"), "--port"),
        (("admin", "create-key", "ada@example.org"), "--scope"),
    ],
)
def test_wrong_usage_exits_with_2(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = taskyard(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_settings_name_their_variables(tmp_path: Path) -> None:
    done = taskyard("config", cwd=tmp_path, TASKYARD_LOG_LEVEL="loud", TASKYARD_RUNS__START_S="-1")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: wrong settings: TASKYARD_LOG_LEVEL: ")
    assert "; TASKYARD_RUNS__START_S: " in line


def test_a_settings_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/taskyard.toml").write_text("log_level = \n")
    done = taskyard("config", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot read {tmp_path}/data/taskyard.toml: ")


def test_an_output_that_cannot_show_a_character(tmp_path: Path) -> None:
    """A terminal without Unicode gets question marks, not a failure."""
    done = taskyard("agents", "install", "n✓", cwd=tmp_path, PYTHONIOENCODING="latin-1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no agent n?; known: claude, codex, scripted")
