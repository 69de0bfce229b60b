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


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TASKYARD_WORKER__POOLS", "gpu", 'TASKYARD_WORKER__POOLS: has to be JSON, such as ["a", "b"]'),
        ("TASKYARD_SECRET_KEYS", "s3cret-word", "TASKYARD_SECRET_KEYS: has to be JSON"),
        (
            "TASKYARD_AGENTS__MINE__COMMAND",
            "opencode acp",
            'has to be a JSON list, such as ["opencode", "acp"]',
        ),
        ("TASKYARD_WORKER__CONCURENCY", "3", "TASKYARD_WORKER__CONCURENCY: there is no such setting"),
        ("TASKYARD_BASE_URL", "yard.example.org", "has to be like https://taskyard.example.org"),
        ("TASKYARD_CONFIG", "/nowhere/taskyard.toml", "there is no file /nowhere/taskyard.toml"),
        ("TASKYARD_CONFIG", f"/{'x' * 300}", f"cannot read /{'x' * 300}: "),
        (
            "TASKYARD_DATABASE_URL",
            "mysql://u:s3cret-word@h/d",
            "postgresql://user:password@host:5432/database",
        ),
        ("TASKYARD_DATABASE_URL", "postgresql://u:a@s3cret-word:b@h/d", "percent encoding"),
    ],
)
def test_a_wrong_setting_says_what_is_right(tmp_path: Path, name: str, value: str, said: str) -> None:
    done = taskyard("config", cwd=tmp_path, **{name: value})
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert said in line
    assert "s3cret-word" not in line


def test_no_settings_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/taskyard.toml").write_text("log_level = \n")
    done = taskyard("config", cwd=tmp_path, TASKYARD_CONFIG="/dev/null")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_slip_in_the_first_part_of_a_name_is_told(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TASKYARD_WROKER__CONCURRENCY=3\n")
    set_here = {"TASKYARD_SANDBOX_REQUIRE": '["memory"]', "TASKYARD_SERVICE_HOST": "10.0.0.1"}
    done = taskyard("config", cwd=tmp_path, TASKYARD_PORT="tcp://10.0.0.1:80", **set_here)
    assert done.returncode == 0
    slips = {
        "TASKYARD_SANDBOX_REQUIRE": "TASKYARD_SANDBOX__REQUIRE",
        "TASKYARD_WROKER__CONCURRENCY": "TASKYARD_WORKER__CONCURRENCY",
    }
    assert sorted(done.stderr.splitlines()) == [
        f"note: there is no setting {slip} (did you mean {meant}?); it does nothing"
        for slip, meant in slips.items()
    ]


def test_a_slip_in_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/taskyard.toml").write_text("[wroker]\nconcurrency = 3\n")
    done = taskyard("config", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "taskyard.toml: there is no wroker (did you mean worker?)." in done.stderr


def test_the_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe=3\n")
    done = taskyard("config", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read .env: ")


def test_a_full_disk_below_the_output(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "taskyard.cli", "config", "--data-dir", str(tmp_path)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("words", [("follow", ""), ("cancel", ""), ("cancel", "x", ""), ("follow", "x", " ")])
def test_an_empty_id_is_no_id(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = taskyard(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "it is empty" in done.stderr


def test_a_prompt_that_is_no_text(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "taskyard.cli", "run"]
    env = {"TASKYARD_URL": "http://127.0.0.1:9", "TASKYARD_API_KEY": "phx_key", "PYTHONUTF8": "1"}
    for words, given in ((["a\udcff"], b""), (["-"], b"a\xff")):
        done = subprocess.run([*command, *words], input=given, env=env, capture_output=True, check=False)
        assert done.returncode in (1, 2)
        assert b"not UTF-8 text" in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_key_that_cannot_be_sent_is_not_shown(tmp_path: Path) -> None:
    for key in ("phx_first\nhalf", "phx_fïrst"):
        done = taskyard("follow", "x", cwd=tmp_path, TASKYARD_URL="http://127.0.0.1:9", TASKYARD_API_KEY=key)
        assert done.returncode == 1
        assert done.stderr.startswith("error: the API key has characters that no key has")
        assert "phx_" not in done.stderr


def test_a_secret_key_that_is_none_does_not_start(tmp_path: Path) -> None:
    done = taskyard("serve", "--port", "0", cwd=tmp_path, TASKYARD_SECRET_KEYS='["s3cret-word"]')
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: entry 1 of TASKYARD_SECRET_KEYS is not a key: 32 bytes in base64.")
    assert "s3cret-word" not in done.stderr
