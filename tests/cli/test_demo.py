"""`taskyard demo`: its parts, and all of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from taskyard.cli import demo
from taskyard.errors import SetupError
from taskyard.settings import Settings
from tests.support.command import taskyard


def settings(folder: Path, **agents: dict[str, list[str]]) -> Settings:
    return Settings(_env_file=None, data_dir=folder, agents=agents)


def passes(folder: Path) -> bool:
    words = [sys.executable, "-m", "unittest", "--quiet"]
    return subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode == 0


def test_the_repository_fails_its_tests_until_it_is_fixed(tmp_path: Path) -> None:
    folder = demo.make_repository(tmp_path / "shop")
    assert demo._git(folder, "status", "--porcelain") == ""
    assert demo._git(folder, "branch", "--show-current") == "main\n"
    assert not passes(folder)
    (folder / "prices.py").write_text(demo.FIXED)
    assert passes(folder)


def test_the_scripted_agent_is_the_last_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = demo.choose_agent(settings(tmp_path))
    assert without.name == "scripted"
    assert (
        without.remark
        == f"{demo.SCRIPTED}\n(For a real agent: set ANTHROPIC_API_KEY, run `taskyard agents install claude`.)"
    )
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert demo.choose_agent(settings(tmp_path)).name == "scripted"
    codex = demo.choose_agent(settings(tmp_path, codex={"command": ["my-codex"]}))
    assert codex.name == "codex"
    assert codex.prompt == demo.REQUEST
    assert codex.env == {"TASKYARD_AGENTS__CODEX__COMMAND": '["my-codex"]'}
    assert "No model" not in codex.remark


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    agent = demo.Agent("scripted", "", "", {})
    with (
        pytest.raises(SetupError, match=r"(?s)the server ended:.*cannot use the data folder"),
        demo.server(tmp_path, agent, keep=False),
    ):
        pytest.fail("it is not ready")


def test_from_nothing_to_a_branch(tmp_path: Path) -> None:
    done = taskyard("demo", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert demo.SCRIPTED in done.stdout
    for text in (
        "✓ Starting agent",
        "● ",
        "✓ completed",
        "-    return sum(prices)",
        "FAILED (failures=1)",
        "Plan",
    ):
        assert text in done.stdout
    assert (
        done.stdout.index("FAILED")
        < done.stdout.index("prices) * discount_percent // 100")
        < done.stdout.index("OK")
    )
    assert "\x1b" not in done.stdout
    assert list(tmp_path.glob("taskyard-demo-*")) == []


def test_keep_leaves_a_server(tmp_path: Path) -> None:
    done = taskyard("demo", "--keep", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    url, key, pid = (
        re.search(pattern, done.stdout)[1]  # type: ignore[index]
        for pattern in (r"still runs at (\S+)", r"API key: (\S+)", r"kill (\d+)")
    )
    try:
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.get(
            f"{url}/api/projects/@current/tasks/", headers=headers, trust_env=False, timeout=60
        )
        assert answer.json()["results"][0]["latest_run"]["status"] == "completed"
    finally:
        os.kill(int(pid), signal.SIGTERM)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the server does not stop"
        time.sleep(0.05)
