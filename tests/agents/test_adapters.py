from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskyard.agents.acp import Session
from taskyard.agents.adapters import CONTRACT_MODES, AgentNotInstalledError, adapters, allowed_efforts
from taskyard.agents.options import Option, auto_answer, choose_mode, option_for
from taskyard.errors import SetupError
from taskyard.settings import AgentSettings, Settings


def settings(tmp_path: Path, **agents: dict[str, Any]) -> Settings:
    parsed = {name: AgentSettings.model_validate(value) for name, value in agents.items()}
    return Settings(data_dir=tmp_path, agents=parsed)


def test_the_built_in_ones(tmp_path: Path) -> None:
    found = adapters(settings(tmp_path))
    assert list(found) == ["claude", "codex", "scripted"]
    for name in ("claude", "codex"):
        assert set(found[name].modes) == set(CONTRACT_MODES[name])
        with pytest.raises(AgentNotInstalledError, match=f"taskyard agents install {name}"):
            found[name].argv()
    assert found["scripted"].argv()[1] == "-I"
    assert Path(found["scripted"].argv()[2]).is_file()


def test_an_installed_package_gives_the_command(tmp_path: Path) -> None:
    adapter = adapters(settings(tmp_path))["claude"]
    entry = Path(adapter.command[-1])
    assert entry.is_relative_to(tmp_path / "agents" / "claude-0.101.0" / "node_modules")
    entry.parent.mkdir(parents=True)
    entry.touch()
    assert adapter.installed
    assert adapter.argv() == list(adapter.command)
    assert Path(adapter.argv()[0]).name == "node"


def test_an_overridden_command_keeps_the_rest(tmp_path: Path) -> None:
    changes = {"command": ["/opt/agent", "--acp"], "env": {"X": "1", "IS_SANDBOX": "0"}, "model": "m"}
    found = adapters(settings(tmp_path, claude=changes))["claude"]
    assert found.argv() == ["/opt/agent", "--acp"]
    assert found.package is None
    assert found.wanted_modes("plan") == ("plan",)
    env = found.environment()
    assert (env["X"], env["IS_SANDBOX"], env["ANTHROPIC_MODEL"]) == ("1", "0", "m")


def test_an_override_without_a_command_keeps_the_package(tmp_path: Path) -> None:
    found = adapters(settings(tmp_path, claude={"model": "claude-opus-4-7"}))["claude"]
    assert found.package is not None
    assert not found.installed
    assert found.default_model == "claude-opus-4-7"


def test_a_new_agent(tmp_path: Path) -> None:
    found = adapters(settings(tmp_path, opencode={"command": ["opencode", "acp"], "env": {"A": "b"}}))
    assert list(found) == ["claude", "codex", "scripted", "opencode"]
    adapter = found["opencode"]
    assert adapter.argv() == ["opencode", "acp"]
    assert adapter.environment("m", "high") == {"A": "b"}
    assert adapter.wanted_modes(None) == ()
    assert adapter.wanted_modes("plan") == ("plan",)
    assert adapter.provider is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mine", {"model": "m"}, "needs a command"),
        ("claude", {"command": []}, "is empty"),
        ("Bad Name", {"command": ["x"]}, "lower-case"),
    ],
)
def test_settings_that_make_no_agent(tmp_path: Path, name: str, value: dict[str, Any], text: str) -> None:
    with pytest.raises(SetupError, match=text):
        adapters(settings(tmp_path, **{name: value}))


def test_the_environment_of_claude(tmp_path: Path) -> None:
    adapter = adapters(settings(tmp_path))["claude"]
    env = adapter.environment("claude-sonnet-4-6", "high")
    assert env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:3128/anthropic"
    assert env["ANTHROPIC_API_KEY"] == "taskyard-gateway"
    assert env["ANTHROPIC_MODEL"] == "claude-sonnet-4-6"
    assert adapter.environment()["ANTHROPIC_MODEL"] == "opus"


def test_the_session_of_claude(tmp_path: Path) -> None:
    adapter = adapters(settings(tmp_path))["claude"]
    options = {"title": "Taskyard run", "promptSuggestions": False}
    assert adapter.session_meta() == {"claudeCode": {"options": options}}
    asked_for_nothing = {**options, "allowedTools": ["mcp__taskyard__submit_result"]}
    assert adapter.session_meta(["taskyard__submit_result"]) == {"claudeCode": {"options": asked_for_nothing}}


def test_the_environment_of_codex(tmp_path: Path) -> None:
    adapter = adapters(settings(tmp_path))["codex"]
    config = json.loads(adapter.environment('gpt "5"', "high")["CODEX_CONFIG"])
    assert config["model"] == 'gpt "5"'
    assert config["model_reasoning_effort"] == "high"
    assert config["model_providers"]["taskyard"]["base_url"] == "http://127.0.0.1:3128/openai/v1"
    config = json.loads(adapter.environment()["CODEX_CONFIG"])
    assert config["model"] == "gpt-5.5"
    assert "model_reasoning_effort" not in config
    assert adapter.files["config.toml"].startswith("[analytics]")


@pytest.mark.parametrize(
    ("name", "mode", "wanted"),
    [
        ("claude", None, ("bypassPermissions",)),
        ("claude", "acceptEdits", ("acceptEdits",)),
        ("codex", None, ("agent-full-access", "full-access")),
        ("codex", "auto", ("agent-full-access", "auto")),
        ("codex", "read-only", ("read-only",)),
        ("codex", "plan", ("read-only", "plan")),
    ],
)
def test_modes(tmp_path: Path, name: str, mode: str | None, wanted: tuple[str, ...]) -> None:
    assert adapters(settings(tmp_path))[name].wanted_modes(mode) == wanted


def test_choose_mode() -> None:
    session = Session("s", modes=("a", "b"))
    assert choose_mode(session, "b") == "b"
    assert choose_mode(session, "x", None, "a") == "a"
    assert choose_mode(session, "x") is None
    assert choose_mode(session) is None
    assert choose_mode(Session("s"), "a") is None


def test_option_for() -> None:
    grouped = {
        "id": "m",
        "category": "model",
        "currentValue": "opus",
        "options": [
            {"group": "g", "options": [{"value": "opus"}, {"value": "sonnet"}]},
            {"value": "haiku"},
            7,
        ],
    }
    boolean = {"id": "thought_level", "currentValue": True}
    session = Session("s", config_options=({"category": "mode"}, grouped, boolean))
    assert option_for(session, "model") == Option("m", ("opus", "sonnet", "haiku"), "opus")
    assert option_for(session, "thought_level") == Option("thought_level", (), None)
    assert option_for(session, "mode") is None  # it has no id
    assert option_for(session, "other") is None


def test_auto_answer() -> None:
    options = [
        {"optionId": "always", "kind": "allow_always"},
        {"optionId": "once", "kind": "allow_once"},
        {"optionId": "auto-confirm", "kind": "allow_once"},
        {"kind": "reject_once"},
        {"optionId": "no", "kind": "reject_once"},
    ]
    assert auto_answer(options, ("allow_once", "allow_always")) == "once"
    assert auto_answer(options[:1], ("allow_once", "allow_always")) == "always"
    assert auto_answer(options, ("reject_once",)) == "no"
    assert auto_answer(options, ("reject_always",)) is None
    assert auto_answer([], ("allow_once",)) is None


@pytest.mark.parametrize(
    ("adapter", "model", "efforts"),
    [
        ("claude", "claude-opus-4-5", "low medium high"),
        ("claude", "claude-opus-4-6", "low medium high xhigh max"),
        ("claude", "claude-opus-4-7", "low medium high xhigh max"),
        ("claude", "claude-opus-4-8", "low medium high xhigh max"),
        ("claude", "claude-fable-5", "low medium high xhigh max"),
        ("claude", "claude-sonnet-4-6", "low medium high"),
        ("claude", "claude-sonnet-5", "low medium high"),
        ("claude", "claude-haiku-4-5", ""),
        ("claude", None, ""),
        ("codex", "gpt-5.4", "low medium high"),
        ("codex", "gpt-5.5", "low medium high xhigh"),
        ("codex", None, "low medium high"),
        ("scripted", "gpt-5.4", ""),
    ],
)
def test_allowed_efforts(adapter: str, model: str | None, efforts: str) -> None:
    """tasks-api §4.8.1, with the later additions."""
    assert allowed_efforts(adapter, model) == tuple(efforts.split())
