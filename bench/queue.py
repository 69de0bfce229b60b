"""A long queue of runs: `python -m bench.queue`. How long a worker takes to take one, by how many are driven."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from taskyard.accounts import admin
from taskyard.db.engine import Database, open_database
from taskyard.runs import queue
from taskyard.runs.queue import Limits
from taskyard.runs.workers import Worker
from taskyard.settings import Settings

PROJECTS = 100
RUNS_EACH = 100
TAKES = 200
LIMITS = Limits(total=5000, per_project=50)
WORKER = Worker(
    name="bench", pools=["default"], capacity=8, sandboxes=[], agents=["claude", "codex", "scripted"]
)


async def fill(database: Database) -> None:
    await admin.create_user(database, "bench@example.org")
    for number in range(PROJECTS):
        await admin.create_project(database, f"Bench {number}")
    await database.execute(
        "INSERT INTO tasks (project_id, task_number, title, description) SELECT id, 1, 'Bench', '' FROM projects"
    )
    await database.execute(
        "INSERT INTO runs (task_id, project_id, status, environment, started_at, state)"
        " SELECT t.id, t.project_id, 'queued', 'cloud', clock_timestamp(),"
        " jsonb_build_object('agent', (ARRAY['claude', 'codex', 'scripted'])[1 + mod(n, 3)])"
        " FROM tasks t, generate_series(1, %(each)s) n",
        each=RUNS_EACH,
    )
    await database.execute("INSERT INTO run_cursors (run_id) SELECT id FROM runs ON CONFLICT DO NOTHING")
    await database.execute(
        "INSERT INTO run_queue (run_id, project_id, environment_id, agent, priority, begun, since)"
        " SELECT id, project_id, '00000000-0000-0000-0000-000000000000', state ->> 'agent',"
        " 0, false, started_at FROM runs"
    )
    await database.execute("ANALYZE")


async def bench() -> None:
    with tempfile.TemporaryDirectory(prefix="taskyard-bench-") as folder:
        settings = Settings(_env_file=None, data_dir=Path(folder) / "data")
        async with open_database(settings, max_connections=4) as database:
            await fill(database)
            for driven in range(0, 3 * TAKES, TAKES):
                times = []
                for _ in range(TAKES):
                    started = time.perf_counter()
                    run_id = await queue.take(database, WORKER, LIMITS)
                    times.append((time.perf_counter() - started) * 1000)
                    assert run_id is not None
                print(
                    f"{driven} to {driven + TAKES} driven: median {statistics.median(times):.1f} ms,"
                    f" p95 {sorted(times)[int(TAKES * 0.95)]:.1f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(asyncio.run(bench()))
