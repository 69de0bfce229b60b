"""`taskyard serve` as a process: start, stop, crash, and the commands beside it."""

from __future__ import annotations

import json
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psycopg

from taskyard.db.embedded import running_url
from tests.support.site import (
    DEADLINE_S,
    Site,
    environment,
    postgres_of,
    running_site,
    running_worker_process,
    taskyard,
    until,
)


def test_first_and_second_start(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running_site(data) as site:
        said = site.said()
        assert f"Taskyard is ready at {site.url}" in said
        assert site.key in said
        assert site.key.startswith("phx_")
        assert site.call("GET", "/health").json() == {"status": "ok"}
        assert site.call("GET", "/ready").json() == {"status": "ready"}
        task = site.call("POST", "tasks/", json={"title": "Kept"}).json()
        assert (data / "first-key").stat().st_mode & 0o777 == 0o600
        assert data.stat().st_mode & 0o777 == 0o700
        assert site.stop() == 0
    assert postgres_of(data) == []
    assert not (data / "server.json").exists()
    with running_site(data) as again:
        assert "phx_" not in again.said()
        assert again.call("GET", f"tasks/{task['id']}/").json() == task


def test_kill_of_the_server_is_survived(tmp_path: Path) -> None:
    data = tmp_path / "data"
    site = Site(data)
    task = site.call("POST", "tasks/", json={"description": "SAY one\nSLEEP 4\nSAY three"}).json()
    run = site.call("POST", f"tasks/{task['id']}/run/", json={"agent": "scripted"}).json()["latest_run"]
    path = f"tasks/{task['id']}/runs/{run['id']}/"
    site.wait(path, status="in_progress")
    site.stop(signal.SIGKILL)
    with running_site(data) as again:
        assert again.call("GET", f"tasks/{task['id']}/").json()["title"] == task["title"]
        other = again.call("POST", "tasks/", json={"description": "SAY two"}).json()
        second = again.call("POST", f"tasks/{other['id']}/run/", json={"agent": "scripted"}).json()[
            "latest_run"
        ]
        again.wait(f"tasks/{other['id']}/runs/{second['id']}/", status="completed")
        # The run whose driver died goes on where it was.
        again.wait(path, status="completed")
        log = again.call("GET", f"{path}logs/").text
        assert "_posthog/session/resume" in log
        assert "three" in log
    assert not any((data / "sandboxes").iterdir())
    assert postgres_of(data) == []


def test_a_stop_ends_the_streams(tmp_path: Path) -> None:
    """Their readers go on when it is back: the end of a stream is not the end of a run."""
    with running_site(tmp_path / "data") as site:
        task = site.call("POST", "tasks/", json={"description": "SAY hello"}).json()
        body = {"agent": "scripted", "mode": "interactive"}
        run = site.call("POST", f"tasks/{task['id']}/run/", json=body).json()["latest_run"]
        path = f"{site.url}/api/projects/@current/tasks/{task['id']}/runs/{run['id']}/stream/"
        headers = {"Authorization": f"Bearer {site.key}"}
        with httpx.stream("GET", path, headers=headers, timeout=DEADLINE_S, trust_env=False) as stream:
            lines = stream.iter_lines()
            assert any("turn_complete" in line for line in lines)
            site.process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass
        assert site.process.wait(DEADLINE_S) == 0
        assert "Traceback" not in site.said()
        assert "Cancel" not in site.said()


def test_a_request_that_a_stop_cuts_short(tmp_path: Path) -> None:
    with running_site(tmp_path / "data") as site:
        address = urlsplit(site.url)
        with socket.create_connection((address.hostname, address.port), timeout=DEADLINE_S) as half:
            half.sendall(
                b"POST /api/projects/@current/tasks/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer %s\r\nContent-Length: 100\r\n\r\n{" % site.key.encode()
            )
            assert site.call("GET", "/ready").json() == {"status": "ready"}
            site.process.send_signal(signal.SIGTERM)
            head, _, body = b"".join(iter(lambda: half.recv(65536), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body)["detail"] == "The server is stopping. Send the request again."
        assert site.process.wait(DEADLINE_S) == 0
        assert "Traceback" not in site.said()


def test_a_second_signal_hands_over_at_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    site = Site(data, "--drain", "600")
    task = site.call("POST", "tasks/", json={"description": "SLEEP 8\nSAY still here"}).json()
    run = site.call("POST", f"tasks/{task['id']}/run/", json={"agent": "scripted"}).json()["latest_run"]
    path = f"tasks/{task['id']}/runs/{run['id']}/"
    until(lambda: site.call("GET", f"{path}logs/").text, lambda log: "_posthog/run_started" in log, str)
    site.process.send_signal(signal.SIGINT)
    until(site.said, lambda said: "waiting for turns to end" in said, str)
    # One signal does not count twice, and clients are answered as long as anything goes on.
    assert site.call("GET", path).json()["status"] == "in_progress"
    assert "stopping at once" not in site.said()
    assert site.stop(signal.SIGINT) == 0
    assert "stopping at once" in site.said()
    with running_site(data) as again:
        again.wait(path, status="completed")


def test_api_and_worker_apart(tmp_path: Path, database_url: str) -> None:
    """Two processes with data folders of their own, as on two machines, over a PostgreSQL of the site's."""
    where = {"TASKYARD_DATABASE_URL": database_url}
    with running_site(tmp_path / "api", command="api", **where) as site:
        task = site.call("POST", "tasks/", json={"description": "SAY hello"}).json()
        run = site.call("POST", f"tasks/{task['id']}/run/", json={"agent": "scripted"}).json()["latest_run"]
        assert run["status"] == "queued"
        path = f"tasks/{task['id']}/runs/{run['id']}/"
        with running_worker_process(tmp_path / "worker", **where) as worker:
            site.wait(path, status="completed")
            assert worker.poll() is None
        assert "hello" in site.call("GET", f"{path}logs/").text
    for folder in ("api", "worker"):
        assert not (tmp_path / folder / "postgres").exists()


def test_parts_need_a_database(tmp_path: Path) -> None:
    for part in ("api", "worker"):
        refused = taskyard(tmp_path / "data", part)
        assert (refused.returncode, "TASKYARD_DATABASE_URL is not set" in refused.stderr) == (1, True)


def test_a_second_server_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running_site(data) as site:
        refused = taskyard(data, "serve", "--port", "0")
        assert refused.returncode == 1
        assert str(site.process.pid) in refused.stderr
        assert "--data-dir" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert site.call("GET", "/ready").status_code == 200


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = taskyard(tmp_path / "data", "serve", "--port", str(port))
    assert refused.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert postgres_of(tmp_path / "data") == []


def test_a_newer_schema(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running_site(data):
        url = running_url(data)
        assert url is not None
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
    refused = taskyard(data, "serve", "--port", "0")
    assert refused.returncode == 1
    assert "schema 9999" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_admin_beside_a_running_server(tmp_path: Path) -> None:
    data = tmp_path / "data"

    def admin(*words: str) -> dict[str, object]:
        done = taskyard(data, "admin", *words, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    with running_site(data) as site:
        user = admin("create-user", "ada@example.org")
        project = admin("create-project", "Shop")
        admin("add-member", "ada@example.org", str(project["id"]))
        key = admin("create-key", "ada@example.org", "--scope", "task:read", "--scope", "task:write")
        assert user["email"] == "ada@example.org"
        header = {"Authorization": f"Bearer {key['key']}"}
        import httpx

        url = f"{site.url}/api/projects/{project['id']}/tasks/"
        assert httpx.get(url, headers=header, trust_env=False).status_code == 200
        admin("revoke-key", str(key["id"]))
        assert httpx.get(url, headers=header, trust_env=False).status_code == 401
    # Without a server the same commands start the database themselves, and stop it again.
    assert admin("create-user", "bob@example.org")["email"] == "bob@example.org"
    assert postgres_of(data) == []
    refused = taskyard(data, "admin", "create-user", "bob@example.org", "--json")
    assert refused.returncode == 1
    assert "there is a user bob@example.org already" in refused.stderr


def test_it_takes_all_the_descriptors_it_may_have(tmp_path: Path, database_url: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    narrow = [
        "prlimit",
        f"--nofile=256:{most}",
        "--",
        sys.executable,
        "-m",
        "taskyard.cli",
        "api",
        "--port",
        "0",
    ]
    data = tmp_path / "data"
    process = subprocess.Popen(
        narrow, env=environment(data, TASKYARD_DATABASE_URL=database_url), cwd=tmp_path
    )
    try:
        until((data / "server.json").exists, bool, lambda _: "server.json of the API")
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        [line] = [line for line in limits.splitlines() if line.startswith("Max open files")]
        assert line.split()[3:5] == [str(most), str(most)]
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
