"""`taskyard sandbox shell`: a person tries the policy of an environment by hand."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from taskyard.cli.sandbox import _raw
from taskyard.db.engine import Database
from tests.conftest import make_settings
from tests.support.command import command_line, taskyard
from tests.support.yard import Yard, ok, open_yard


@pytest.fixture
async def yard(tmp_path: Path, database_url: str, database: Database) -> AsyncIterator[Yard]:
    (tmp_path / "data").mkdir(mode=0o700)
    async with open_yard(make_settings(tmp_path / "data", database_url), database) as yard:
        yield yard


@pytest.fixture
def shell(tmp_path: Path, database_url: str) -> Any:
    def call(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return taskyard(
            "sandbox",
            "shell",
            *words,
            cwd=tmp_path,
            stdin=stdin,
            TASKYARD_DATABASE_URL=database_url,
            ANTHROPIC_API_KEY="sk-of-the-site",
        )

    return call


async def environment(yard: Yard, name: str, **fields: Any) -> str:
    return str(ok(await yard.api().post("sandbox_environments/", {"name": name, **fields}), 201)["id"])


async def test_what_an_agent_would_find(yard: Yard, shell: Any, tmp_path: Path) -> None:
    await environment(
        yard,
        "strict",
        network_access_level="custom",
        allowed_domains=["pypi.org"],
        environment_variables={"GREETING": "hello from there"},
        setup_script="echo setting up; echo $GREETING > ~/ready",
    )
    script = "id -un; pwd; cat ~/ready; curl -sS https://example.com; exit 7"
    done = shell("strict", "-c", script)
    assert done.returncode == 7
    assert done.stdout.splitlines()[:3] == ["agent", "/tmp/workspace", "hello from there"]
    said = done.stderr
    assert "network access 'custom' to 1 hosts" in said
    assert "setting up\n" in said
    assert "Network: refused CONNECT example.com:443" in said
    assert "add 'example.com' to allowed_domains" in said
    assert list((tmp_path / "data" / "sandboxes").iterdir()) == []


async def test_models_do_not_answer(yard: Yard, shell: Any) -> None:
    body = '{"model": "claude-opus-4-8", "max_tokens": 1, "messages": []}'
    done = shell("-c", f"curl -sS http://127.0.0.1:3128/anthropic/v1/messages -d '{body}'")
    assert "claude-opus-4-8" in done.stdout
    assert "Network: refused POST /anthropic/v1/messages" in done.stderr


async def test_a_script_at_standard_input(yard: Yard, shell: Any) -> None:
    done = shell("--no-setup", stdin="echo $((6*7))\nexit 5\n")
    assert (done.returncode, done.stdout) == (5, "42\n")


async def test_environments_that_are_not_there_or_not_one(yard: Yard, shell: Any) -> None:
    done = shell("nowhere")
    assert (done.returncode, done.stderr) == (1, "error: there is no sandbox environment 'nowhere'\n")
    first, second = [await environment(yard, "twin") for _ in range(2)]
    done = shell("twin", "-c", "true")
    assert done.returncode == 1
    assert first in done.stderr
    assert second in done.stderr
    assert shell(second, "-c", "true").returncode == 0


async def test_a_set_up_script_that_fails(yard: Yard, shell: Any) -> None:
    await environment(yard, "broken", setup_script="echo before; exit 9")
    done = shell("broken", "-c", "echo inside")
    assert done.returncode == 1
    assert "'broken' ended with exit code 9" in done.stderr
    assert shell("broken", "--no-setup", "-c", "echo inside").stdout == "inside\n"


def test_at_a_terminal(tmp_path: Path, database_url: str) -> None:
    """The shell has a terminal of its own: keys, their echo, and Ctrl-C work, and the way outside stays as it was."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        settings = {"TASKYARD_DATABASE_URL": database_url, "TASKYARD_DATA_DIR": str(tmp_path / "data")}
        argv = command_line("sandbox", "shell")
        os.execvpe(argv[0], argv, {**os.environ, **settings, "TERM": "dumb"})
    said = b""

    def until(text: str) -> None:
        """Read until it comes, and forget what came before."""
        nonlocal said
        deadline = time.monotonic() + 60
        while text.encode() not in said:
            ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
            assert ready, f"no {text!r} in {said.decode()!r}"
            said += os.read(terminal, 65536)
        said = said.partition(text.encode())[2]

    try:
        until("A shell in the sandbox trial-")
        until("$ ")
        os.write(terminal, b"tty; echo $((6*7))\r")
        until("/dev/pts/")
        until("\r\n42\r\n")
        until("$ ")
        os.write(terminal, b"sh -c 'echo now $((3*4)); exec sleep 600'\r")
        until("now 12\r\n")
        os.write(terminal, b"\x03")
        until("$ ")
        os.write(terminal, b"echo alive=$((40+4))\r")
        until("alive=44\r\n")
        until("$ ")
        os.write(terminal, b"exit 6\r")
    finally:
        end = os.pidfd_open(pid)
        if not select.select([end], [], [], 60)[0]:
            os.kill(pid, 9)
        status = os.waitpid(pid, 0)[1]
        os.close(end)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 6
    assert list((tmp_path / "data" / "sandboxes").iterdir()) == []


def test_what_was_typed_is_not_for_the_next_shell() -> None:
    """A terminal answers what a sandbox writes to it as if a person had typed."""
    ours, terminal = pty.openpty()
    try:
        with _raw(terminal):
            os.write(ours, b"reboot\n")
            assert select.select([terminal], [], [], 60)[0], "it does not arrive"
        os.write(ours, b"next\n")
        assert os.read(terminal, 100) == b"next\n"
    finally:
        os.close(ours)
        os.close(terminal)
