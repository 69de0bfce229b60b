"""`taskyard doctor`: what is checked and how it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from taskyard.cli import doctor
from taskyard.objects.s3 import S3Store
from taskyard.sandbox.provider import Problem
from taskyard.settings import ObjectSettings, S3Settings, Settings
from tests.support import s3_keeper
from tests.support.command import taskyard
from tests.support.docker_keeper import IMAGE
from tests.support.s3 import s3_settings


def settings(folder: Path) -> Settings:
    return Settings(_env_file=None, data_dir=folder)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("git", True, "git version 2", "install it", True), "✓ git: git version 2\n"),
        (Problem("key", False, "not set", "Set it.", False), "! key: not set\n    Set it.\n"),
        (Problem("git", False, "not found", "", True), "✗ git: not found\n"),
    ],
)
def test_lines(problem: Problem, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(problem)
    assert capsys.readouterr().out == text


def test_this_machine(tmp_path: Path) -> None:
    found = {problem.name: problem for problem in doctor._machine(settings(tmp_path / "not/yet/there"))}
    assert list(found) == ["Python", "git", "data folder", "PostgreSQL"]
    assert found["git"].detail.startswith("git version ")
    assert found["PostgreSQL"].ok
    assert "postgres (PostgreSQL) 18" in found["PostgreSQL"].detail
    assert "GB free" in found["data folder"].detail
    assert not (tmp_path / "not").exists()


def test_missing_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    git = {problem.name: problem for problem in doctor._machine(settings(tmp_path))}["git"]
    assert (git.ok, git.fatal, git.detail) == (False, True, "not found")
    node = next(iter(doctor._agents(settings(tmp_path))))
    assert (node.ok, node.fatal) == (False, False)
    assert "'node' was not found on PATH" in node.detail


def test_an_outside_database(tmp_path: Path, database_url: str) -> None:
    for url, ok, text in (
        (database_url, True, "version 18"),
        ("postgresql://u:s3cret-word@127.0.0.1:1/d", False, "Connection refused"),
    ):
        given = settings(tmp_path).model_copy(update={"database_url": SecretStr(url)})
        problem = {problem.name: problem for problem in doctor._machine(given)}["PostgreSQL"]
        assert (problem.ok, problem.fatal) == (ok, True)
        assert text in problem.detail
        assert "s3cret-word" not in problem.detail


def test_a_data_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problem = doctor._disk(tmp_path / "file")
    assert (problem.ok, problem.fatal) == (False, True)


def test_agents_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    own = settings(tmp_path)
    found = {problem.name: problem for problem in (*doctor._agents(own), *doctor._keys(own))}
    assert (found["agent claude"].ok, found["agent claude"].fatal) == (False, False)
    assert found["agent claude"].remedy == "taskyard agents install claude"
    assert found["agent scripted"].ok
    assert (found["anthropic key"].ok, found["openai key"].ok) == (True, False)
    assert "sk-secret" not in str(found)


async def bucket(folder: Path, s3: S3Settings) -> list[Problem]:
    own = settings(folder).model_copy(update={"objects": ObjectSettings(s3=s3)})
    return [problem async for problem in doctor._bucket(own)]


async def test_a_bucket(tmp_path: Path, s3_url: str) -> None:
    """What clients do with it, too; nothing stays behind."""
    (good,) = await bucket(tmp_path, s3_settings(s3_url))
    assert (good.ok, good.detail.startswith(f"bucket artifacts at {s3_url}: ")) == (True, True), good
    client: Any = S3Store(s3_settings(s3_url))._client
    assert "Contents" not in client.list_objects_v2(Bucket="artifacts", Prefix="tasks/artifacts/doctor/")
    client.close()
    assert await bucket(tmp_path, S3Settings()) == []


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"access_key_id": "nobody"}, "it cannot be written: "),
        ({"secret_access_key": "wrong"}, "SignatureDoesNotMatch"),
        ({"secret_access_key_file": "/no/such/file", "secret_access_key": None}, "it cannot be signed for: "),
        ({"endpoint_url": "http://127.0.0.1:1"}, "it cannot be written: Could not connect"),
        (
            {"public_endpoint_url": "http://127.0.0.1:1"},
            "clients cannot upload to http://127.0.0.1:1/artifacts: ",
        ),
    ],
)
async def test_a_bucket_that_does_not_work(
    tmp_path: Path, s3_url: str, changes: dict[str, Any], detail: str
) -> None:
    (bad,) = await bucket(tmp_path, s3_settings(s3_url, **changes))
    assert (bad.ok, bad.fatal) == (False, True)
    assert detail in bad.detail
    assert s3_keeper.SECRET_KEY not in str(bad)


def test_the_command(tmp_path: Path) -> None:
    """All of it on this machine, the attacks on a real sandbox included."""
    done = taskyard("doctor", "--json", cwd=tmp_path)
    found = {problem["name"]: problem for problem in json.loads(done.stdout)}
    assert {"Python", "git", "data folder", "PostgreSQL", "agent scripted", "anthropic key"} <= set(found)
    failed = [problem for problem in found.values() if problem["fatal"] and not problem["ok"]]
    assert failed == []
    assert done.returncode == 0


def test_the_command_with_a_container_engine(tmp_path: Path, docker_host: str) -> None:
    """The agents are the image's, so this machine's Node.js does not matter."""
    variables = {"PROVIDER": "docker", "DOCKER__HOST": docker_host, "DOCKER__IMAGE": IMAGE}
    variables = {f"TASKYARD_SANDBOX__{name}": value for name, value in variables.items()}
    done = taskyard("doctor", "--json", cwd=tmp_path, **variables)
    found = {problem["name"]: problem for problem in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert {"container engine", "sandbox image", "sandbox limits", "sandbox: open descriptors"} <= set(found)
    assert found["agent scripted"]["ok"]
    assert found["agent claude"]["detail"] == "not in the image: claude-agent-acp"
    assert "deploy/agent-image" in found["agent codex"]["remedy"]
    assert "Node.js" not in found


@pytest.mark.parametrize(("key", "ok"), [(s3_keeper.ACCESS_KEY, True), ("nobody", False)])
def test_the_command_with_a_bucket(tmp_path: Path, s3_url: str, key: str, ok: bool) -> None:
    """By the variables that the server reads; a bucket that cannot be used fails the command."""
    names = {
        "BUCKET": "artifacts",
        "ENDPOINT_URL": s3_url,
        "ACCESS_KEY_ID": key,
        "SECRET_ACCESS_KEY": s3_keeper.SECRET_KEY,
        "PATH_STYLE": "true",
    }
    variables = {f"TASKYARD_OBJECTS__S3__{name}": value for name, value in names.items()}
    done = taskyard("doctor", "--json", cwd=tmp_path, **variables)
    found = {problem["name"]: problem for problem in json.loads(done.stdout)}
    assert found["object storage"]["ok"] is ok
    assert found["object storage"]["detail"].startswith(f"bucket artifacts at {s3_url}: ")
    assert done.returncode == (0 if ok else 1)
    assert s3_keeper.SECRET_KEY not in done.stdout + done.stderr
