"""A real container engine for tests: one for the whole session, started when first asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskyard.settings.sandboxes import DockerSettings, SandboxSettings
from tests.support import docker_keeper
from tests.support.docker_keeper import IMAGE
from tests.support.postgres import shared_session

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def docker_host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`unix://PATH` of an engine that has the image IMAGE and no network of its own.

    TASKYARD_TEST_DOCKER_HOST names another one to try the tests on, such as Podman's, which has the image already.
    """
    if other := os.environ.get("TASKYARD_TEST_DOCKER_HOST"):
        yield other
        return
    session, run = shared_session(request, tmp_path_factory)
    name = f"taskyard-docker-{run}"
    folder = Path(tempfile.gettempdir()) / name  # short: the paths of sockets have 107 bytes at most
    keeper = subprocess.Popen(
        [sys.executable, "-m", "tests.support.docker_keeper", str(session / "docker.lock"), str(folder)],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    with keeper:  # leaving closes the pipes and waits
        assert keeper.stdout is not None
        said = keeper.stdout.readline().strip()
        if said.startswith("no: "):
            pytest.skip(said.removeprefix("no: "))
        assert said == "ready", "the container engine did not start: see the traceback above"
        yield f"unix://{folder}/docker.sock"


@pytest.fixture
def own_docker_folder() -> Iterator[Path]:
    """The folder of an engine for one test, with `docker.sock`; see docker_keeper for how to end and start it."""
    folder = Path(tempfile.gettempdir()) / f"taskyard-docker-{uuid.uuid4().hex}"
    try:
        docker_keeper.start(folder)
        docker_keeper.bring_image(folder)
    except docker_keeper.CannotError as error:
        pytest.skip(str(error))
    yield folder
    docker_keeper.stop(folder)


def docker_settings(host: str, **changes: object) -> SandboxSettings:
    """The settings of sandboxes on this engine. changes: of the area `docker`."""
    docker = DockerSettings(**{"host": host, "image": IMAGE, **changes})
    return SandboxSettings(provider="docker", docker=docker)
