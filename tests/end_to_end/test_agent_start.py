"""Agents that do not come up: each way has its own `error_type`, at once, and shows what happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskyard.settings import AgentSettings, RunSettings, Settings
from tests.conftest import make_settings
from tests.support.yard import Yard, of_method

REFUSES = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    error = {"code": -32000, "message": "Please log in first"}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": error}), flush=True)
"""
OTHER_VERSION = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"jsonrpc": "2.0", "id": json.loads(line)["id"], "result": {"protocolVersion": 7}}), flush=True)
"""


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    commands = {
        "absent": ["/opt/no/such/agent"],
        "dies": ["sh", "-c", "echo the library libagent.so is missing >&2; exit 3"],
        "hangs": ["sh", "-c", "echo waiting for a licence >&2; sleep 600"],
        "refuses": ["python3", "-c", REFUSES],
        "newer": ["python3", "-c", OTHER_VERSION],
        "chatters": ["sh", "-c", "echo this is no JSON; exit 0"],
    }
    return make_settings(
        tmp_path / "data",
        database_url,
        runs=RunSettings(start_s=3),
        agents={name: AgentSettings(command=command) for name, command in commands.items()},
    )


@pytest.mark.parametrize(
    ("agent", "error_type", "text"),
    [
        ("absent", "agent_start_failed", "/opt/no/such/agent"),
        ("dies", "agent_start_failed", "libagent.so is missing"),
        ("hangs", "agent_start_timeout", "waiting for a licence"),
        ("refuses", "agent_refused", "Please log in first"),
        ("newer", "agent_refused", "ACP version 7"),
        ("chatters", "agent_start_failed", "exit code 0"),
        ("claude", "agent_not_installed", "taskyard agents install claude"),
    ],
)
async def test_start_failures(live: Yard, agent: str, error_type: str, text: str) -> None:
    chosen = (
        {"runtime_adapter": "claude", "model": "claude-sonnet-4-6"} if agent == "claude" else {"agent": agent}
    )
    run = await live.api().start("SAY never", **chosen)
    body = await run.status("failed", "completed")
    assert (body["state"].get("error_type"), body["status"]) == (error_type, "failed"), body
    assert text in body["error_message"]
    log = await run.log()
    failed = [step for step in of_method(log, "_posthog/progress") if step["status"] == "failed"]
    assert [(step["step"], step["detail"]) for step in failed] == [("agent", body["error_message"])]
