"""Two API processes and two workers, each with a data folder of its own, on one database and one object storage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg

from tests.support.site import DEADLINE_S, Site, environment, taskyard, until
from tests.support.yard import parse_frames

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
