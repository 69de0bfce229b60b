"""Several machines: two API processes and two workers, each with a data folder of its own, on one PostgreSQL and one
S3-compatible server."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support import s3_keeper
from tests.support.machines import Machines, WorkerProcess, statuses
from tests.support.s3 import BUCKET
from tests.support.site import DEADLINE_S, Site, until
from tests.support.yard import said


@pytest.fixture
def settings_of_all() -> dict[str, str]:
    """Limits and the like, which are the same on every machine."""
    return {}


@pytest.fixture
def machines(
    tmp_path: Path, database_url: str, s3_url: str, settings_of_all: dict[str, str]
) -> Iterator[Machines]:
    env = {
        "TASKYARD_DATABASE_URL": database_url,
        "TASKYARD_SECRET_KEYS": json.dumps([base64.b64encode(os.urandom(32)).decode()]),
        "TASKYARD_OBJECTS__S3__BUCKET": BUCKET,
        "TASKYARD_OBJECTS__S3__ENDPOINT_URL": s3_url,
        "TASKYARD_OBJECTS__S3__PATH_STYLE": "true",
        "TASKYARD_OBJECTS__S3__ACCESS_KEY_ID": s3_keeper.ACCESS_KEY,
        "TASKYARD_OBJECTS__S3__SECRET_ACCESS_KEY": s3_keeper.SECRET_KEY,
        "TASKYARD_OBJECTS__FOLDER": f"tests/{tmp_path.name}",
        "TASKYARD_WORKER__CONCURRENCY": "2",
        **settings_of_all,
    }
    with ExitStack() as stack:
        workers = []
        for name in ("one", "two"):
            workers.append(WorkerProcess(tmp_path / f"worker-{name}", name, **env))
            stack.callback(workers[-1].stop)
        with ThreadPoolExecutor() as pool:  # each waits until its process is ready
            folders = [tmp_path / f"api-{n}" for n in "ab"]
            apis = list(pool.map(lambda folder: Site(folder, command="api", **env), folders))
        for api in apis:
            stack.callback(api.stop)
        found = Machines(tmp_path, database_url, apis, workers, env)
        until(
            lambda: found.rows("SELECT count(*) FROM workers WHERE NOT stopping")[0][0],
            lambda count: count == 2,
            lambda count: f"two workers, but {count}: {found.said()}",
        )
        yield found


def test_a_site_of_several_machines(machines: Machines) -> None:
    # Four runs on two workers with room for two each; a fifth waits, and says for what.
    runs = [machines.start("SAY hello\nSLEEP 300", api=n % 2, mode="interactive") for n in range(4)]
    for run in runs:
        machines.wait(run, "in_progress")
    assert sorted(str(machines.drives(run)) for run in runs) == ["one", "one", "two", "two"]
    fifth = machines.start("SAY late", api=1)
    queued = until(
        lambda: machines.call("GET", fifth, 0).json()["state"].get("queue"),
        lambda place: place is not None and "busy" in place["reason"],
        lambda place: f"reason to wait in {place}",
    )
    assert queued == {"position": 1, "reason": "all workers of the pool 'default' are busy"}
    listed = machines.listed()
    assert {name: (worker["status"], worker["running"], worker["capacity"]) for name, worker in listed.items()} == {
        "one": ("live", 2, 2),
        "two": ("live", 2, 2),
    }  # fmt: skip
    assert "scripted" in listed["one"]["agents"]

    # What one API process takes reaches the agent, and what that says comes out of the other.
    run = runs[0]
    machines.hear(run, "hello", api=1)
    assert machines.command(run, 0, "cancel")["result"] == {"cancelled": True}
    machines.command(run, 1, "user_message", content="SAY again")
    until(lambda: said(machines.log(run, 0)), lambda text: "again" in text, lambda text: f"again in {text!r}")

    # Its end makes room for the fifth, which no restart or look was needed for.
    machines.call("PATCH", run, 1, json={"status": "completed"})
    assert machines.wait(fifth, "completed")["state"].get("queue") is None
    streams = [machines.stream(run, n) for n in range(2)]
    assert streams[0] == streams[1]
    assert statuses(streams[0])[-1] == "completed"
    logs = [machines.call("GET", f"{run}logs/", n).content for n in range(2)]
    assert logs[0] == logs[1]

    # Files go through S3: given to one API process, shown by the other.
    item = {"name": "notes.txt", "type": "output", "content": "from here", "content_type": "text/plain"}
    made = machines.call("POST", f"{run}artifacts/", 0, json={"artifacts": [item]})
    assert made.status_code == 200, made.text
    path = made.json()["artifacts"][-1]["storage_path"]
    shown = machines.call("POST", f"{run}artifacts/presign/", 1, json={"storage_path": path}).json()
    assert httpx.get(shown["url"], trust_env=False).content == b"from here"
    for other in runs[1:]:
        machines.call("PATCH", other, 1, json={"status": "cancelled"})


class TestLimits:
    @pytest.fixture
    def settings_of_all(self) -> dict[str, str]:
        return {"TASKYARD_RUNS__LIMIT_PER_PROJECT": "3"}

    def test_hold_across_workers(self, machines: Machines) -> None:
        runs = [machines.start("SLEEP 1", api=n % 2) for n in range(10)]
        most, ended = 0, 0
        end = time.monotonic() + 2 * DEADLINE_S
        while ended < len(runs):
            assert time.monotonic() < end, f"{ended} of the runs ended; the workers said {machines.said()}"
            held, ended = machines.rows(
                "SELECT (SELECT count(*) FROM run_cursors WHERE leased_until IS NOT NULL),"
                " (SELECT count(*) FROM runs WHERE status IN ('completed', 'failed'))"
            )[0]
            most = max(most, held)
        # The workers have room for four.
        assert most == 3
        assert {machines.call("GET", run).json()["status"] for run in runs} == {"completed"}


def test_a_worker_that_is_stopped_leaves_the_list(machines: Machines) -> None:
    run = machines.start("SAY x")
    machines.wait(run, "completed")
    assert machines.workers[0].stop() == 0
    assert set(machines.listed()) == {"two"}
    machines.wait(machines.start("SAY y", api=1), "completed")


def test_a_run_outlives_its_worker(machines: Machines) -> None:
    run = machines.start("SAY before\nSLEEP 8\nSAY after")
    machines.hear(run, "before")
    first = machines.drives(run)
    dead = next(worker for worker in machines.workers if worker.name == first)
    dead.stop(signal.SIGKILL)
    begun = time.monotonic()
    until(
        lambda: machines.drives(run),
        lambda name: name not in (None, first),
        lambda name: f"other worker than {name}; the workers said {machines.said()}",
    )
    # The lease runs out within 20 s, is found lost at most 5 s later, and once more 3 s later.
    assert time.monotonic() - begun < 45
    body = machines.wait(run, "completed", "failed", api=1)
    assert (body["status"], body["error_message"]) == ("completed", None)
    # One record, whoever wrote it.
    assert statuses(machines.stream(run, 0))[-1] == "completed"
    assert machines.listed()[str(first)]["status"] == "lost"
