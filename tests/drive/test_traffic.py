"""The gateway of a run: what settings, environment and run make of its policy, and what it tells."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taskyard.db.engine import Database, Row
from taskyard.drive.failures import RunFailure
from taskyard.drive.recorder import Recorder
from taskyard.drive.traffic import (
    MAX_REFUSALS,
    CallLog,
    Refusals,
    budget_end,
    budget_of,
    open_gateway,
    spending,
)
from taskyard.events import store as events
from taskyard.events.entries import Shown
from taskyard.gateway import store
from taskyard.gateway.server import Gateway, ModelCall, Refusal, Usage
from taskyard.runs import store as runs
from taskyard.settings import BudgetSettings, ModelSettings, NetworkSettings, Settings, Upstream
from tests.conftest import make_settings
from tests.support.rows import make_run

CALL = ModelCall("anthropic", "/v1/messages", "claude-a", 200, True, True, 1.5, 10, 20, 30, 40, 0.25)


def environment(level: str = "custom", *domains: str, include: bool = False) -> Row:
    return {
        "name": "Build",
        "network_access_level": level,
        "allowed_domains": list(domains),
        "include_default_domains": include,
    }


class Room:
    """A run with a recorder, without a driver."""

    def __init__(self, database: Database, row: Row, recorder: Recorder) -> None:
        self.database, self.row, self.recorder = database, row, recorder

    async def open(self, settings: Settings, environment: Row | None = None, **state: Any) -> Gateway:
        row = self.row | {"state": state}
        return await open_gateway(settings, self.database, row, environment, self.recorder)

    async def entries(self) -> list[dict[str, Any]]:
        await self.recorder.flush()
        rows = await events.read(self.database, self.row["id"], Shown.BOTH, after=0, limit=1000)
        return [json.loads(row.data)["notification"]["params"] for row in rows]

    async def notes(self) -> list[str]:
        return [entry["message"] for entry in await self.entries() if "message" in entry]


@pytest.fixture
async def room(database: Database) -> AsyncIterator[Room]:
    claimed = await runs.claim(database, await make_run(database), "test")
    assert claimed is not None
    row = await database.fetch_one("SELECT * FROM runs WHERE id = %(run)s", run=claimed.lease.run_id)
    assert row is not None
    recorder = Recorder(database, claimed.lease, on_lost=lambda: None)
    yield Room(database, row, recorder)
    await recorder.close()


@asynccontextmanager
async def opened(room: Room, settings: Settings, *args: Any, **state: Any) -> AsyncIterator[Gateway]:
    gateway = await room.open(settings, *args, **state)
    try:
        yield gateway
    finally:
        await gateway.close()


# --- budgets ---


@pytest.mark.parametrize(
    ("limits", "state", "tokens"),
    [
        ({}, {}, None),
        ({"tokens": 10}, {}, 10),
        ({"tokens": 10}, {"budget_tokens": 20}, 20),
        ({"max_tokens": 15}, {"budget_tokens": 20}, 15),
        ({"max_tokens": 15}, {}, 15),
        ({"tokens": 10, "max_tokens": 15}, {}, 10),
        ({"tokens": 20, "max_tokens": 15}, {}, 15),
        ({}, {"budget_tokens": 20}, 20),
    ],
)
def test_which_budget_counts(limits: dict[str, int], state: dict[str, int], tokens: int | None) -> None:
    """The same for tokens and for dollars."""
    used = Usage(input_tokens=1, output_tokens=1, cached_write_tokens=1, cached_read_tokens=10**9, cost=3.0)
    budget = budget_of(BudgetSettings(**limits), state, used)
    dollars = budget_of(
        BudgetSettings(**{name.replace("tokens", "cost"): value for name, value in limits.items()}),
        {name.replace("tokens", "cost"): value for name, value in state.items()},
        used,
    )
    assert (budget.limited, dollars.in_dollars) == (tokens is not None, tokens is not None)
    for one, kind in ((budget, "tokens"), (dollars, "cost")):
        tab = one.open()
        setattr(tab, kind, (tokens or 10**6) - 4)
        assert one.exceeded is None, "three are used already"
        setattr(tab, kind, (tokens or 10**6) - 3)
        assert (one.exceeded is not None) is (tokens is not None)


async def test_a_month_of_a_project(room: Room, tmp_path: Path, database_url: str) -> None:
    budget = BudgetSettings(project_month_cost=1.0)
    settings = make_settings(tmp_path, database_url, budget=budget)
    run, project = room.row["id"], room.row["project_id"]
    await store.add(room.database, run, project, [replace(CALL, cost=0.75), replace(CALL, cost=None)])
    # Neither other projects nor earlier months count.
    await store.add(room.database, run, project + 1, [CALL])
    await store.add(room.database, run, project, [replace(CALL, cost=50.0)])
    await room.database.execute(
        "UPDATE model_calls SET ended_at = date_trunc('month', clock_timestamp(), 'UTC') - interval '1 s',"
        " run_id = %(other)s WHERE cost = 50",
        other=await make_run(room.database),
    )
    assert await store.project_cost_this_month(room.database, project) == 0.75
    async with opened(room, settings) as gateway:
        assert gateway.over_budget is None
    await store.add(room.database, run, project, [CALL])
    async with opened(room, settings) as gateway:
        assert gateway.over_budget is not None
        assert "the budget of $1.00 that this run's project has for a month" in gateway.over_budget
    async with opened(room, make_settings(tmp_path, database_url)) as gateway:
        assert gateway.over_budget is None


async def test_usage_of_earlier_workers_is_there(room: Room, tmp_path: Path, database_url: str) -> None:
    run, project = room.row["id"], room.row["project_id"]
    calls = [
        CALL,
        replace(CALL, model="gpt-b", cost=None),
        replace(CALL, model=None, status=500, metered=False),
    ]
    await store.add(room.database, run, project, calls)
    await store.add(room.database, await make_run(room.database), project, [CALL])
    in_memory = Usage()
    for call in calls:
        in_memory.add(call)
    async with opened(room, make_settings(tmp_path, database_url), budget_tokens=210) as gateway:
        assert gateway.usage == in_memory
        assert spending(gateway.usage)["token_usage"]["models"]["claude-a"]["input_tokens"] == 10
        assert gateway.over_budget == "this run's budget of 210 tokens is used up (210 were used)."


async def test_odd_calls_can_be_kept(room: Room) -> None:
    odd = replace(CALL, model="a\0b" * 100, input_tokens=10**30, cost=1e30, seconds=1e9)
    log = CallLog(room.database, room.row["id"], room.row["project_id"])
    log.add(odd)
    log.add(CALL)
    await log.close()
    rows = await room.database.fetch("SELECT model, input_tokens FROM model_calls ORDER BY id")
    assert len(rows[0]["model"]) == 200
    assert [row["input_tokens"] for row in rows] == [10**15, 10]


@pytest.mark.parametrize("end", ["failed", "completed"])
def test_the_end(tmp_path: Path, end: Any) -> None:
    settings = make_settings(tmp_path, "", budget=BudgetSettings(end=end))
    told = budget_end(settings, "this run's budget of 5 tokens is used up.")
    assert told.status == end
    assert told.message.startswith("This run's budget of 5 tokens is used up. What was done so far is kept")


def test_many_models_stay_a_short_list() -> None:
    usage = Usage()
    for number in range(200):
        usage.add(replace(CALL, model=f"model-{number}-{'x' * 500}"))
    assert (usage.calls, len(usage.models), usage.models["other"].calls) == (200, 51, 150)
    assert max(map(len, usage.models)) == 200


# --- network ---


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (None, None),
        (environment("full"), "The sandbox environment 'Build' gives network access 'full'."),
        (
            environment("trusted"),
            "The sandbox environment 'Build' gives network access 'trusted' to 2 hosts.",
        ),
        (
            environment("custom", "a.example", "*.b.example", "a b", "*"),
            (
                "The sandbox environment 'Build' gives network access 'custom' to 2 hosts. "
                "Ignored, because they are no host names: a b, *."
            ),
        ),
        (
            environment("custom", "a.example", include=True),
            "The sandbox environment 'Build' gives network access 'custom' to 3 hosts.",
        ),
        (
            environment("custom"),
            (
                "The sandbox environment 'Build' gives network access 'custom' to 0 hosts: the model APIs and the "
                "repository only."
            ),
        ),
    ],
    ids=["no environment", "full", "trusted", "custom", "with the default list", "empty"],
)
async def test_the_note(
    room: Room, tmp_path: Path, database_url: str, row: Row | None, note: str | None
) -> None:
    settings = make_settings(tmp_path, database_url, trusted_domains=["t.example", "*.t.example"])
    async with opened(room, settings, row):
        assert await room.notes() == ([] if note is None else [note])


@pytest.mark.parametrize(("level", "expected"), [("full", "full"), ("trusted", "listed"), ("none", "none")])
async def test_runs_without_an_environment(
    room: Room, tmp_path: Path, database_url: str, level: Any, expected: str
) -> None:
    settings = make_settings(tmp_path, database_url, network=NetworkSettings(default=level, max_bytes=5))
    async with opened(room, settings) as gateway:
        network = gateway._policy.network
    assert (network.level, network.max_bytes) == (expected, 5)


# --- settings that cannot work ---


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ({"anthropic": Upstream(base_url="ftp://x")}, "must look like https://host/path"),
        ({"openai": Upstream(base_url="https://x", api_key="a b")}, "look for a line break"),
        ({"openai": Upstream(base_url="https://x", headers={"a b": "c"})}, "The header 'a b'"),
        ({"openai": Upstream(base_url="https://x", version="v1")}, "looks like /v1"),
        ({"openai": Upstream(base_url="https://x", query="a b")}, "like name=value"),
        (
            {"openai": Upstream(base_url="https://x", api_key_file=Path("/nonexistent/key"))},
            "models.openai.api_key_file cannot be read: No such file or directory",
        ),
        ({"prices": {"m": {"input": 1}}}, "price of the model 'm'"),
    ],
    ids=range(7),
)
async def test_a_run_says_which_setting_is_wrong(
    room: Room, tmp_path: Path, database_url: str, models: dict[str, Any], reason: str
) -> None:
    settings = make_settings(tmp_path, database_url, models=ModelSettings(**models))
    with pytest.raises(RunFailure) as caught:
        await room.open(settings)
    assert caught.value.error_type == "agent_start_failed"
    assert reason in caught.value.message
    assert "a b" not in caught.value.message.replace("'a b'", "")


# --- what is told ---


async def test_refusals_are_shown_once_and_not_without_end(room: Room) -> None:
    shown = Refusals("run", room.recorder)
    for number in range(3 * MAX_REFUSALS):
        for _ in range(2):
            shown(Refusal("CONNECT", f"host-{number}:443", "no.", 403, f"host-{number}"))
    notes = await room.notes()
    assert len(notes) == MAX_REFUSALS
    assert notes[0] == "Network: refused CONNECT host-0:443: no."
    assert notes[-1].endswith("(further refusals are not shown)")


async def test_a_call_is_an_entry_and_a_row(room: Room, tmp_path: Path, database_url: str) -> None:
    gateway = await room.open(make_settings(tmp_path, database_url))
    gateway._called(CALL)
    await gateway.close()
    [entry] = [one for one in await room.entries() if "used" in one]
    counts = {"inputTokens": 10, "outputTokens": 20, "cachedReadTokens": 30, "cachedWriteTokens": 40}
    assert (entry["used"], entry["model"], entry["cost"]) == (counts, "claude-a", 0.25)
    usage = await store.usage_of(room.database, room.row["id"])
    assert usage == gateway.usage
