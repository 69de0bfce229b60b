"""`taskyard config`: values, origins, and no secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from taskyard.cli import config
from tests.support.command import taskyard


def test_each_setting_says_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/taskyard.toml").write_text(
        '[runs]\ninactivity_s = 5\nstart_s = 6\n[agents.mine]\ncommand = ["opencode", "acp"]\n'
    )
    (tmp_path / ".env").write_text("TASKYARD_RUNS__START_S=7\nTASKYARD_WORKER__CONCURRENCY=2\n")
    done = taskyard(
        "config",
        "--json",
        cwd=tmp_path,
        TASKYARD_WORKER__CONCURRENCY="3",
        TASKYARD_MODELS__OPENAI='{"base_url": "http://gate:pass@example.org", "api_key": "sk-one"}',
        TASKYARD_DATABASE_URL="postgresql://u:dbpass@h/d",
        TASKYARD_AGENTS__MINE__ENV='{"MY_TOKEN": "tok-two"}',
        ANTHROPIC_API_KEY="sk-three",
    )
    assert done.returncode == 0, done.stderr
    found = {line["name"]: (line["value"], line["origin"]) for line in json.loads(done.stdout)}
    toml = str(tmp_path / "data/taskyard.toml")
    assert found["TASKYARD_DATA_DIR"] == (str(tmp_path / "data"), "environment")
    assert found["TASKYARD_RUNS__INACTIVITY_S"] == ("5.0", toml)
    assert found["TASKYARD_RUNS__START_S"] == ("7.0", ".env")
    assert found["TASKYARD_WORKER__CONCURRENCY"] == ("3", "environment")
    assert found["TASKYARD_RUNS__AGENT_SILENCE_S"][1] == "default"
    assert found["TASKYARD_MODELS__OPENAI__BASE_URL"] == ("http://(hidden)@example.org", "environment")
    assert found["TASKYARD_MODELS__OPENAI__API_KEY"] == ("(hidden)", "environment")
    assert found["TASKYARD_MODELS__ANTHROPIC__API_KEY"] == ("(hidden)", "ANTHROPIC_API_KEY")
    assert found["TASKYARD_DATABASE_URL"] == ("(hidden)", "environment")
    assert found["TASKYARD_AGENTS__MINE__COMMAND"] == ('["opencode", "acp"]', toml)
    assert found["TASKYARD_AGENTS__MINE__ENV__MY_TOKEN"] == ("(hidden)", "environment")
    for secret in ("sk-one", "tok-two", "sk-three", "dbpass", "pass@"):
        assert secret not in done.stdout


def test_every_setting_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskyard.settings import Settings

    monkeypatch.chdir(tmp_path)
    names = {line.name for line in config.explain(Settings())}
    for name in Settings.model_fields:
        assert any(found.startswith(f"TASKYARD_{name.upper()}") for found in names), name


def test_lines_for_people(tmp_path: Path) -> None:
    done = taskyard("config", "--data-dir", "here", cwd=tmp_path)
    assert done.stdout.splitlines()[0].split() == [
        "TASKYARD_DATA_DIR",
        str(tmp_path / "here"),
        "(environment)",
    ]
