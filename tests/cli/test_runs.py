"""`run`, `follow` and `cancel` against a stand-in for the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import started, taskyard
from tests.support.tasks_server import (
    RUN,
    RUN_PATH,
    TASK,
    Connection,
    Seen,
    StandIn,
    bearer,
    message,
    progress,
    run_json,
    state,
    task_json,
    tasks_server,
)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with tasks_server() as stand_in:
        stand_in.answers["POST", "tasks/"] = lambda _: (201, task_json())
        stand_in.answers["POST", f"tasks/{TASK}/run/"] = lambda _: (
            200,
            task_json(latest_run=run_json("queued")),
        )
        stand_in.answers["GET", f"tasks/{TASK}/"] = lambda _: (200, task_json(latest_run=run_json("queued")))
        stand_in.answers["POST", "repositories/"] = lambda _: (201, {"name": "local/shop", "origin": "x"})
        yield stand_in


def remote(server: StandIn) -> dict[str, str]:
    return {"TASKYARD_URL": server.url, "TASKYARD_API_KEY": "secret-key"}


def bodies(server: StandIn) -> list[Any]:
    return [request.body for request in server.seen if request.method == "POST"]


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.invalid"]
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    (folder / "src").mkdir(parents=True)
    (folder / "src/a.py").write_text("a\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "one")
    return folder


def test_tells_what_was_started_and_how_to_follow_it(server: StandIn, tmp_path: Path) -> None:
    done = taskyard("run", "Fix it\n\nall of it", cwd=tmp_path, **remote(server))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"task    {TASK}  DEF-0",
        f"run     {RUN}",
        f"url     {server.url}/api/projects/@current/{RUN_PATH}",
        f"follow  taskyard follow {TASK}",
    ]
    task, run = bodies(server)
    assert (task["title"], task["description"], "repository" in task) == (
        "Fix it",
        "Fix it\n\nall of it",
        False,
    )
    assert run == {}
    assert {bearer(request) for request in server.seen} == {"secret-key"}


def test_json_and_a_prompt_from_standard_input(server: StandIn, tmp_path: Path) -> None:
    text = "x" * 300 + "\nmore\n"
    done = taskyard("run", "-", "--json", cwd=tmp_path, stdin=text, **remote(server))
    assert json.loads(done.stdout)["run"] == RUN
    assert bodies(server)[0]["title"] == "x" * 255
    assert bodies(server)[0]["description"] == text.strip()


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (("--agent", "claude"), {"runtime_adapter": "claude", "model": "claude-opus-4-7"}),
        (("--agent", "codex"), {"runtime_adapter": "codex", "model": "gpt-5.5"}),
        (("--agent", "codex", "--model", "m"), {"runtime_adapter": "codex", "model": "m"}),
        (("--agent", "scripted"), {"agent": "scripted"}),
        (("--branch", "dev"), {"branch": "dev"}),
    ],
)
def test_choice_of_agent_and_branch(
    server: StandIn, tmp_path: Path, words: tuple[str, ...], body: dict[str, str]
) -> None:
    assert taskyard("run", "x", *words, cwd=tmp_path, **remote(server)).returncode == 0
    assert bodies(server)[-1] == body


@pytest.mark.parametrize("named", ["shop", "./shop/src", "ABSOLUTE"])
def test_a_folder_is_registered_by_its_repository(
    server: StandIn, tmp_path: Path, repository: Path, named: str
) -> None:
    named = str(repository) if named == "ABSOLUTE" else named
    done = taskyard("run", "x", "--repo", named, cwd=tmp_path, **remote(server))
    assert (done.returncode, done.stderr) == (0, "")
    registered, task, _ = bodies(server)
    assert registered == {"origin": str(repository)}
    assert task["repository"] == "local/shop"


def test_changes_that_are_not_committed_are_mentioned(
    server: StandIn, tmp_path: Path, repository: Path
) -> None:
    (repository / "src/a.py").write_text("b\n")
    done = taskyard("run", "x", "--repo", "shop", cwd=tmp_path, **remote(server))
    assert done.returncode == 0
    assert done.stderr == f"note: changes in {repository} that are not committed are not part of the run\n"


def test_a_bare_repository(server: StandIn, tmp_path: Path, repository: Path) -> None:
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "bare.git")
    assert taskyard("run", "x", "--repo", "bare.git", cwd=tmp_path, **remote(server)).returncode == 0
    assert bodies(server)[0] == {"origin": str(tmp_path / "bare.git")}


@pytest.mark.parametrize("url", ["https://example.org/a/b.git", "git@example.org:a/b.git", "file:///srv/b"])
def test_urls_are_registered_as_they_are(server: StandIn, tmp_path: Path, url: str) -> None:
    assert taskyard("run", "x", "--repo", url, cwd=tmp_path, **remote(server)).returncode == 0
    assert bodies(server)[0] == {"origin": url}


def test_a_name_the_server_knows(server: StandIn, tmp_path: Path) -> None:
    assert taskyard("run", "x", "--repo", "acme/shop", cwd=tmp_path, **remote(server)).returncode == 0
    assert bodies(server)[0]["repository"] == "acme/shop"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("nowhere", "there is no such folder"),
        ("../a/b/c", "there is no such folder"),
        ("file", "this is a file"),
        ("plain", "this is not a git repository (make it one with `git init`)"),
        ("empty", "the repository has no commit yet"),
    ],
)
def test_folders_that_will_not_do(server: StandIn, tmp_path: Path, named: str, said: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "plain").mkdir()
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "--quiet")
    done = taskyard("run", "x", "--repo", named, cwd=tmp_path, **remote(server))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --repo ")
    assert said in line
    assert server.seen == []


def test_follow_shows_the_run_and_exits_with_its_outcome(server: StandIn, tmp_path: Path) -> None:
    server.events = [state(1, "in_progress"), message(2, "Hello "), message(3, "you"), state(4, "completed")]
    server.run("completed", branch="b", output={"head_branch": "b"})
    done = taskyard("run", "x", "--follow", cwd=tmp_path, **remote(server))
    assert (done.returncode, done.stdout) == (0, "Hello you\n\n✓ completed\n  branch b\n")
    server.run("failed", error_message="It broke", state={"error_type": "agent_crashed"})
    done = taskyard("follow", TASK, cwd=tmp_path, **remote(server))
    assert done.returncode == 1
    assert done.stdout.endswith("✗ failed\n  It broke\n  (agent_crashed)\n")
    assert taskyard("follow", TASK, RUN, cwd=tmp_path, **remote(server)).returncode == 1


def test_cancel(server: StandIn, tmp_path: Path) -> None:
    server.answers["PATCH", RUN_PATH] = lambda _: (200, run_json("cancelled"))
    done = taskyard("cancel", TASK, cwd=tmp_path, **remote(server))
    assert (done.returncode, done.stdout) == (0, f"run {RUN}: cancelled\n")
    server.run("completed")
    done = taskyard("cancel", TASK, RUN, cwd=tmp_path, **remote(server))
    assert (done.returncode, done.stdout) == (0, f"run {RUN} has ended already: completed\n")


def test_a_task_without_a_run(server: StandIn, tmp_path: Path) -> None:
    server.answers["GET", f"tasks/{TASK}/"] = lambda _: (200, task_json())
    done = taskyard("follow", TASK, cwd=tmp_path, **remote(server))
    assert (done.returncode, done.stderr) == (1, f"error: task {TASK} has no run yet.\n")


def test_refusals_of_the_server_are_one_line(server: StandIn, tmp_path: Path) -> None:
    refusal = {
        "type": "validation_error",
        "code": "invalid_input",
        "detail": "Unknown \x1b[31magent",
        "attr": "agent",
    }
    server.answers["POST", f"tasks/{TASK}/run/"] = lambda _: (400, refusal)
    done = taskyard("run", "x", cwd=tmp_path, **remote(server))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: agent: Unknown agent\n")


# --- which server ---


def local_server(folder: Path, url: str, pid: int) -> None:
    (folder / "data").mkdir()
    (folder / "data/server.json").write_text(json.dumps({"url": url, "pid": pid}))
    (folder / "data/first-key").write_text("first\n")


def test_no_server_anywhere(tmp_path: Path) -> None:
    done = taskyard("run", "x", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no Taskyard server is running here")
    assert "`taskyard serve`" in line


def test_a_server_that_is_not_reachable(tmp_path: Path, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    done = taskyard("run", "x", cwd=tmp_path, TASKYARD_URL=url, TASKYARD_API_KEY="k")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: cannot reach the server at {url}: connection refused\n"


def test_the_local_server_is_found_with_its_first_key(server: StandIn, tmp_path: Path) -> None:
    local_server(tmp_path, server.url, os.getpid())
    assert taskyard("run", "x", cwd=tmp_path).returncode == 0
    assert taskyard("run", "x", cwd=tmp_path, TASKYARD_URL=server.url + "/").returncode == 0
    assert {bearer(request) for request in server.seen} == {"first"}
    assert taskyard("run", "x", cwd=tmp_path, TASKYARD_API_KEY="mine").returncode == 0
    assert bearer(server.seen[-1]) == "mine"


def test_another_folder(server: StandIn, tmp_path: Path) -> None:
    local_server(tmp_path, server.url, os.getpid())
    done = taskyard("run", "x", "--data-dir", "data", cwd=tmp_path, TASKYARD_DATA_DIR="/nowhere")
    assert done.returncode == 0


def test_the_first_key_is_not_sent_elsewhere(server: StandIn, tmp_path: Path) -> None:
    local_server(tmp_path, "http://127.0.0.1:1", os.getpid())
    done = taskyard("run", "x", cwd=tmp_path, TASKYARD_URL=server.url)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: no API key for {server.url}: set TASKYARD_API_KEY.\n",
    )
    assert server.seen == []


def test_a_dead_server_is_none(server: StandIn, tmp_path: Path) -> None:
    finished = subprocess.Popen(["true"])
    finished.wait()
    local_server(tmp_path, server.url, finished.pid)
    done = taskyard("run", "x", cwd=tmp_path)
    assert done.returncode == 1
    assert "no Taskyard server is running here" in done.stderr


def test_what_a_run_waits_for_is_told_when_it_changes(server: StandIn, tmp_path: Path) -> None:
    busy = {"position": 2, "reason": "all workers of the pool 'default' are busy"}
    places: list[Any] = [
        busy,
        busy,
        {**busy, "position": 1},
        {"position": 1, "reason": "a worker is about to take it"},
    ]

    def answer(_: Seen) -> tuple[int, Any]:
        if places:
            return 200, run_json("queued", state={"queue": places.pop(0)})
        return 200, run_json("completed")

    server.answers["GET", RUN_PATH] = answer
    server.events = [state(1, "completed")]
    done = taskyard("follow", TASK, cwd=tmp_path, **remote(server))
    assert (done.returncode, places) == (0, [])
    told = [line for line in done.stdout.splitlines() if "Waiting" in line]
    assert told == [
        f"Waiting, number {number} in the queue: all workers of the pool 'default' are busy."
        for number in (2, 1)
    ]


def test_ctrl_c_leaves_the_run_alone(server: StandIn, tmp_path: Path) -> None:
    first = progress(1, "Setting up sandbox")
    server.events = [first, state(2, "completed")]
    gate = threading.Event()
    server.connections = [Connection(piece=len(f"id: {first[0]}\ndata: {first[1]}\n\n"), gate=gate)]
    server.run("in_progress")
    with started("follow", TASK, cwd=tmp_path, **remote(server)) as process:
        assert process.stdout is not None
        # The line arrives although the output is no terminal: nothing waits for a full buffer.
        assert process.stdout.readline() == "✓ Setting up sandbox\n"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    gate.set()
    assert process.returncode == 130
    assert errors == ""
    assert f"taskyard follow {TASK} {RUN}" in rest
    assert f"taskyard cancel {TASK} {RUN}" in rest
    assert [request.method for request in server.seen if request.method != "GET"] == []


def test_a_lost_connection_is_mentioned_once(server: StandIn, tmp_path: Path) -> None:
    server.events = [message(1, "one "), state(2, "completed")]
    server.connections = [Connection(upto=20, end="cut"), Connection(status=503), Connection()]
    server.run("completed")
    done = taskyard("follow", TASK, cwd=tmp_path, **remote(server))
    assert done.returncode == 0
    assert done.stdout.count("Trying again: the connection was cut.") == 1
    assert "one" in done.stdout
