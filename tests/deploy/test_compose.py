"""`deploy/`: every service of the compose file is started as a process, with its own command and environment."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from taskyard.settings import Settings
from tests.support.compose import DEADLINE_S, DEPLOY, Processes, Service, services
from tests.support.machines import statuses
from tests.support.s3_keeper import free_ports
from tests.support.site import until
from tests.support.yard import parse_frames

Json = dict[str, Any]
ROOT = DEPLOY.parent
SECRETS = {
    "POSTGRES_PASSWORD": "0123456789abcdef",
    "SECRET_KEY": base64.b64encode(os.urandom(32)).decode(),
    "S3_SECRET_KEY": "fedcba9876543210",
}
OURS = ("api-1", "api-2", "worker-1", "worker-2")


@pytest.fixture
def read() -> dict[str, Service]:
    return services(SECRETS)


class TestFile:
    def test_secrets_have_to_be_given(self) -> None:
        for name in SECRETS:
            with pytest.raises(KeyError, match=name):
                services({other: text for other, text in SECRETS.items() if other != name})

    def test_every_variable_is_a_setting_with_a_good_value(
        self, read: dict[str, Service], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in OURS:
            ours = {
                key: text for key, text in read[name]["environment"].items() if key.startswith("TASKYARD_")
            }
            for key in ours:
                assert is_setting(key), key
            with monkeypatch.context() as patch:
                for key, text in ours.items():
                    patch.setenv(key, text)
                settings = Settings(_env_file=None)
            assert settings.objects.s3.secret() == SECRETS["S3_SECRET_KEY"]
            assert settings.runs.limit_per_project is None
            assert not name.startswith("worker") or settings.worker.name == name
        assert not is_setting("TASKYARD_RUNS__LIMITS")

    def test_what_has_to_be_the_same_is(self, read: dict[str, Service]) -> None:
        own = {"FORWARDED_ALLOW_IPS", "ANTHROPIC_API_KEY", "OPENAI_API_KEY"}
        common = [
            {
                key: text
                for key, text in read[name]["environment"].items()
                if key not in own and not key.startswith("TASKYARD_WORKER__")
            }
            for name in OURS
        ]
        assert common == [common[0]] * len(OURS)
        assert "TASKYARD_SECRET_KEYS" in common[0]
        folders = [read[name]["volumes"] for name in OURS]
        assert folders == [[f"{name}:/var/lib/taskyard"] for name in OURS], (
            "each has a data folder of its own"
        )

    def test_the_parts_fit_each_other(self, read: dict[str, Service]) -> None:
        env, postgres, s3 = read["api-1"]["environment"], read["postgres"]["environment"], read["s3"]
        assert env["TASKYARD_DATABASE_URL"] == (
            f"postgresql://{postgres['POSTGRES_USER']}:{postgres['POSTGRES_PASSWORD']}@postgres:5432/{postgres['POSTGRES_DB']}"
        )
        assert s3["environment"] == {
            "AWS_ACCESS_KEY_ID": env["TASKYARD_OBJECTS__S3__ACCESS_KEY_ID"],
            "AWS_SECRET_ACCESS_KEY": env["TASKYARD_OBJECTS__S3__SECRET_ACCESS_KEY"],
        }
        assert f"-bucket={env['TASKYARD_OBJECTS__S3__BUCKET']}" in s3["command"]
        proxy = read["proxy"]
        published = [port.partition(":")[0] for port in proxy["ports"]]
        for name in ("PUBLIC_URL", "FILES_URL"):
            assert proxy["environment"][name].rpartition(":")[2] in published
        assert proxy["environment"]["PUBLIC_URL"] == env["TASKYARD_BASE_URL"]
        assert proxy["environment"]["FILES_URL"] == env["TASKYARD_OBJECTS__S3__PUBLIC_ENDPOINT_URL"]

    def test_the_image_has_what_the_services_start(self, read: dict[str, Service]) -> None:
        lines = (DEPLOY / "Dockerfile").read_text().splitlines()
        copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
        ignored = (ROOT / ".dockerignore").read_text().split()
        assert copied
        for name in copied:
            assert (ROOT / name).exists()
            assert f"!{name}" in ignored
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert {project["readme"], *project["license-files"]} <= set(copied)
        assert 'ENTRYPOINT ["taskyard"]' in lines
        assert "taskyard" in project["scripts"]
        for name in OURS:
            help_of = [sys.executable, "-m", "taskyard.cli", *read[name]["command"], "--help"]
            assert subprocess.run(help_of, capture_output=True, check=False).returncode == 0


def is_setting(variable: str) -> bool:
    model: type[BaseModel] = Settings
    *areas, last = variable.removeprefix("TASKYARD_").lower().split("__")
    for area in areas:
        inner = model.model_fields[area].annotation if area in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return False
        model = inner
    return last in model.model_fields


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Processes]:
    """All services, running; the database is the tests' own."""
    public, files = free_ports(2)
    urls = {"PUBLIC_URL": f"http://localhost:{public}", "FILES_URL": f"http://localhost:{files}"}
    site = Processes(tmp_path, services(SECRETS | urls))
    database = site.services["api-1"]["environment"]["TASKYARD_DATABASE_URL"]
    site.addresses[database] = database_url
    with site.stack:
        start_s3(site)
        for name in ("worker-1", "worker-2", "api-1", "api-2"):
            command = list(site.services[name]["command"])
            if "--port" in command:
                port = command.index("--port") + 1
                command[port] = site.own(name, command[port])
            site.start(name, ["taskyard", *command], TASKYARD_DATA_DIR=str(tmp_path / name / "data"))
        caddyfile = tmp_path / "Caddyfile"
        caddyfile.write_text(site.local((DEPLOY / "Caddyfile").read_text()))
        site.start("proxy", ["caddy", "run", "--config", str(caddyfile), "--adapter", "caddyfile"])
        for name in ("api-1", "api-2"):
            site.wait(name, f"http://{site.addresses[f'{name}:8000']}/ready")
        site.wait("proxy", f"{urls['PUBLIC_URL']}/ready")
        yield site


def start_s3(site: Processes) -> None:
    command = ["weed", *site.services["s3"]["command"]]
    port = site.own("s3", "8333")
    command = [word.replace("8333", port) if word.startswith("-s3.port=") else word for word in command]
    command[command.index("-dir=/data")] = f"-dir={site.folder / 's3'}"
    names = ("master", "volume", "filer")
    ports = free_ports(2 * len(names) + 1)
    command += [f"-{name}.port={one}" for name, one in zip(names, ports, strict=False)]
    command += [f"-{name}.port.grpc={one}" for name, one in zip(names, ports[len(names) :], strict=False)]
    site.start("s3", [*command, f"-s3.port.grpc={ports[-1]}", "-ip=127.0.0.1"])
    health = site.services["s3"]["healthcheck"]["test"][-1]
    site.wait("s3", health.replace("8333", port))


class Client:
    """Speaks to the site as people do: to its one address."""

    def __init__(self, site: Processes) -> None:
        self.site = site
        self.url = site.services["proxy"]["environment"]["PUBLIC_URL"]
        said = "".join(site.said(name) for name in ("api-1", "api-2"))
        match = re.search(r"API key \(shown once, .*\): (\S+)", said)
        assert match is not None, said
        self._headers = {"Authorization": f"Bearer {match[1]}"}

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        url = f"{self.url}/api/projects/@current/{path}"
        answer = httpx.request(
            method, url, headers=self._headers, timeout=DEADLINE_S, trust_env=False, **options
        )
        assert answer.is_success, f"{answer.status_code} {answer.text}"
        return answer

    def start(self, script: str, **body: Any) -> str:
        task = self.call("POST", "tasks/", json={"title": "A task", "description": script}).json()
        made = self.call("POST", f"tasks/{task['id']}/run/", json={"agent": "scripted", **body}).json()
        return f"tasks/{task['id']}/runs/{made['latest_run']['id']}/"

    def wait(self, path: str, status: str) -> Json:
        found: Json = until(
            lambda: self.call("GET", path).json(),
            lambda run: run["status"] == status,
            lambda run: f"status {status}: {run}; {self.site.said('worker-1')[-2000:]}",
        )
        return found

    def hear(self, path: str, text: str) -> None:
        """Read the stream until the agent has said something: what comes is not held back by the proxy."""
        url = f"{self.url}/api/projects/@current/{path}stream/"
        with httpx.stream("GET", url, headers=self._headers, timeout=DEADLINE_S, trust_env=False) as answer:
            assert any("agent_message_chunk" in line and text in line for line in answer.iter_lines())


def test_the_whole_site(site: Processes) -> None:
    client = Client(site)
    runs = [client.start(f"SAY hello {n}\nSLEEP 300", mode="interactive") for n in range(3)]
    for n, run in enumerate(runs):
        client.hear(run, f"hello {n}")

    # Links that the API gives go through the proxy, too: the signature of the storage covers its public address.
    item = {"name": "notes.txt", "type": "output", "content": "from here", "content_type": "text/plain"}
    made = client.call("POST", f"{runs[0]}artifacts/", json={"artifacts": [item]}).json()
    path = made["artifacts"][-1]["storage_path"]
    link = client.call("POST", f"{runs[0]}artifacts/presign/", json={"storage_path": path}).json()["url"]
    assert link.startswith(site.services["proxy"]["environment"]["FILES_URL"])
    assert httpx.get(link, trust_env=False).content == b"from here"
    form = client.call(
        "POST",
        f"{runs[0]}artifacts/prepare_upload/",
        json={"artifacts": [{"name": "up.txt", "type": "output", "size": 4, "content_type": "text/plain"}]},
    ).json()["artifacts"][0]
    post = form["presigned_post"]
    assert httpx.post(post["url"], data=post["fields"], files={"file": b"sent"}, trust_env=False).is_success
    log_url = client.call("GET", runs[0]).json()["log_url"]
    assert log_url.startswith(client.url)
    assert b"hello 0" in httpx.get(log_url, trust_env=False).content

    # One API process dies: nobody notices.
    healthy(site, "api-2")
    site.kill("api-1")
    for n, run in enumerate(runs):
        client.hear(run, f"hello {n}")
        client.call("PATCH", run, json={"status": "completed"})
    frames = parse_frames(client.call("GET", f"{runs[0]}stream/").text)
    assert statuses(frames)[-1] == "completed"
    last = client.start("SAY last")
    client.wait(last, "completed")
    until(
        lambda: listed(site),
        lambda text: "worker-1:" in text and "worker-2:" in text,
        lambda text: f"two workers: {text}",
    )


def healthy(site: Processes, name: str) -> None:
    """What Docker asks the container."""
    how, program, *words = site.services[name]["healthcheck"]["test"]
    assert (how, program) == ("CMD", "python")
    words = [word.replace("127.0.0.1:8000", site.addresses[f"{name}:8000"]) for word in words]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def listed(site: Processes) -> str:
    """`taskyard admin workers`, as it is asked inside one of the containers."""
    env = {
        **site.environment("api-2"),
        "PATH": os.environ["PATH"],
        "TASKYARD_DATA_DIR": str(site.folder / "api-2/data"),
    }
    command = [sys.executable, "-m", "taskyard.cli", "admin", "workers"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout
