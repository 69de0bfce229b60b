"""Several machines: two API processes and two workers, each with a data folder of its own, on one PostgreSQL and one
S3-compatible server."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.support import s3_keeper
from tests.support.s3 import BUCKET
from tests.support.site import DEADLINE_S, Site, environment, running_site, taskyard
from tests.support.yard import parse_frames, said

Json = dict[str, Any]


class WorkerProcess:
    """A `taskyard worker`; `name` is how the list of workers begins its entry."""

    def __init__(self, folder: Path, name: str, **env: str) -> None:
        self.name = name
        self.output = folder.parent / f"{name}.log"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "taskyard.cli", "worker"],
                env=environment(folder, TASKYARD_WORKER__NAME=name, **env),
                cwd=folder.parent,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


@dataclass
class Machines:
    folder: Path
    database_url: str
    apis: list[Site]
    workers: list[WorkerProcess]
    env: dict[str, str]

    @property
    def key(self) -> str:
        """The first user's, which the API process that started first has made."""
        return next(site.key for site in self.apis if (site.data_dir / "first-key").exists())

    def call(self, method: str, path: str, api: int = 0, **options: Any) -> httpx.Response:
        """Through one of the API processes."""
        return httpx.request(
            method,
            path if path.startswith("http") else f"{self.apis[api].url}/api/projects/@current/{path}",
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=DEADLINE_S,
            trust_env=False,
            **options,
        )

    def start(self, script: str, api: int = 0, **body: Any) -> str:
        """The path of a new run."""
        task = self.call("POST", "tasks/", api, json={"title": "A task", "description": script}).json()
        path = f"tasks/{task['id']}/run/"
        started = self.call("POST", path, api, json={"agent": "scripted", **body}).json()
        return f"tasks/{task['id']}/runs/{started['latest_run']['id']}/"

    def wait(self, path: str, *wanted: str, api: int = 0) -> Json:
        found: Json = until(
            lambda: dict(self.call("GET", path, api).json()),
            lambda run: run["status"] in wanted,
            lambda run: f"status {wanted} of {run}; the workers said {self.said()}",
        )
        return found

    def log(self, path: str, api: int = 0) -> list[Json]:
        return [json.loads(line) for line in self.call("GET", f"{path}logs/", api).text.splitlines()]

    def stream(self, path: str, api: int) -> list[tuple[str, Json]]:
        """The whole stream of a run that has ended; its numbers grow."""
        found = parse_frames(self.call("GET", f"{path}stream/?start=beginning", api).text)
        numbers = [int(event_id.rpartition("-")[2]) for event_id, _ in found]
        assert numbers == sorted(set(numbers))
        return found

    def hear(self, path: str, text: str, api: int = 0) -> None:
        """Read the run's stream until the agent has said something."""
        url = f"{self.apis[api].url}/api/projects/@current/{path}stream/"
        headers = {"Authorization": f"Bearer {self.key}"}
        with httpx.stream("GET", url, headers=headers, timeout=DEADLINE_S, trust_env=False) as response:
            for line in response.iter_lines():
                if "agent_message_chunk" in line and text in line:
                    return
        raise AssertionError(f"the stream of {path} ended without {text!r}")

    def command(self, path: str, api: int, method: str, **params: Any) -> Json:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = self.call("POST", f"{path}command/", api, json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def rows(self, query: str) -> list[Any]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(query.encode()).fetchall()

    def drives(self, path: str) -> str | None:
        """The name of the worker that has a run."""
        run = path.rstrip("/").rpartition("/")[2]
        found = self.rows(
            f"SELECT worker FROM run_cursors WHERE run_id = '{run}' AND leased_until IS NOT NULL"
        )
        return str(found[0][0]).partition(":")[0] if found and found[0][0] else None

    def listed(self) -> dict[str, Json]:
        done = taskyard(self.folder / "desk", "admin", "workers", "--json", **self.env)
        assert done.returncode == 0, done.stderr
        return {worker["name"].partition(":")[0]: worker for worker in json.loads(done.stdout)}

    def said(self) -> str:
        return "\n".join(worker.output.read_text(errors="replace")[-1500:] for worker in self.workers)


def statuses(stream: list[tuple[str, Json]]) -> list[str]:
    return [event["status"] for _, event in stream if event["type"] == "task_run_state"]


def until(probe: Callable[[], Any], good: Callable[[Any], bool], message: Callable[[Any], str]) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not good(value := probe()):
        assert time.monotonic() < end, f"after {DEADLINE_S} s no {message(value)}"
        time.sleep(0.05)
    return value


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
        apis = [stack.enter_context(running_site(tmp_path / f"api-{n}", command="api", **env)) for n in "ab"]
        for name in ("one", "two"):
            workers.append(WorkerProcess(tmp_path / f"worker-{name}", name, **env))
            stack.callback(workers[-1].stop)
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
    # The lease runs out after 20 s, and is found lost twice, 5 s apart.
    assert time.monotonic() - begun < 45
    body = machines.wait(run, "completed", "failed", api=1)
    assert (body["status"], body["error_message"]) == ("completed", None)
    # One record, whoever wrote it.
    assert statuses(machines.stream(run, 0))[-1] == "completed"
    assert machines.listed()[str(first)]["status"] == "lost"
