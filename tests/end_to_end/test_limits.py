"""What a run's sandbox may use: each limit that an agent breaks ends the run with a reason of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from taskyard.db.engine import Database
from taskyard.sandbox import disk
from taskyard.settings import RateLimitSettings, RunSettings
from taskyard.settings.sandboxes import SandboxSettings
from tests.conftest import make_settings
from tests.support.yard import Json, Yard, open_yard

BIG = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    result = {"initialize": {"protocolVersion": 1, "agentCapabilities": {}}, "session/new": {"sessionId": "s"}}
    if message.get("method") == "session/prompt":
        %s
    elif "id" in message:
        answer = {"jsonrpc": "2.0", "id": message["id"], "result": result.get(message["method"], {})}
        print(json.dumps(answer), flush=True)
"""
"""An ACP agent that does something excessive when it is told anything."""

EXCESS = {
    "memory": "x = bytearray(400_000_000); x[::4096] = x[::4096]; import time; time.sleep(60)",
    "disk": "open('big', 'wb').write(bytes(90_000_000)); import time; time.sleep(120)",
    "files": "[open(str(n), 'w').close() for n in range(20_000)]; import time; time.sleep(120)",
    "output": "[print('x' * 1000, flush=True) for _ in range(3000)]",
    "errors": "[print('x' * 1000, file=sys.stderr) for _ in range(3000)]; import time; time.sleep(60)",
}


@pytest.fixture
async def live(
    tmp_path: Path, database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Yard]:
    monkeypatch.setattr(disk, "REST_S", 2.0)
    agents = {}
    for name, excess in EXCESS.items():
        program = tmp_path / f"{name}.py"
        program.write_text(BIG % excess)
        agents[name] = {"command": ["python3", str(program)]}
    settings = make_settings(
        tmp_path / "data",
        database_url,
        agents=agents,
        rate_limits=RateLimitSettings(enabled=False),
        runs=RunSettings(max_attempts=1),
        sandbox=SandboxSettings(memory_mb=256, disk_mb=64, output_mb=2, pids=200, tmp_mb=64),
    )
    async with open_yard(settings, database, worker=True) as yard:
        yield yard


@pytest.mark.parametrize(
    ("agent", "error_type", "setting"),
    [
        pytest.param(
            "memory",
            "oom",
            "MEMORY_MB",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root here"),
        ),
        ("disk", "disk", "DISK_MB"),
        ("files", "disk", "DISK_MB"),
        ("output", "output", "OUTPUT_MB"),
        ("errors", "output", "OUTPUT_MB"),
    ],
)
async def test_too_much_fails_the_run(live: Yard, agent: str, error_type: str, setting: str) -> None:
    run = await live.api().start("go", agent=agent)
    body: Json = await run.status("failed", "completed")
    assert (body["status"], body["state"].get("error_type")) == ("failed", error_type), body["error_message"]
    assert f"TASKYARD_SANDBOX__{setting}" in body["error_message"]
    assert len(await run.log()) < 500, "what it wrote does not flood the record"


async def test_what_a_worker_cannot_give_is_refused(
    tmp_path: Path, database_url: str, database: Database
) -> None:
    sandbox: Any = SandboxSettings(require=["memory", "kernel"])
    settings = make_settings(tmp_path / "data", database_url, sandbox=sandbox)
    async with open_yard(settings, database, worker=True) as yard:
        run = await yard.api().start("SAY x", agent="scripted")
        body = await run.status("failed", "completed")
    assert (body["status"], body["state"]["error_type"]) == ("failed", "sandbox_failed")
    assert "'bubblewrap'" in body["error_message"]
    assert "shares the kernel of its host" in body["error_message"]
