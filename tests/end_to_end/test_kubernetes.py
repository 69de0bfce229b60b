"""Whole runs whose sandboxes are pods, on the stand-in of a cluster."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from taskyard.settings import RunSettings, Settings
from tests.conftest import make_settings
from tests.support.kube_api import KubeApi, open_api
from tests.support.kube_hut import kube_settings
from tests.support.repositories import heads, run_git
from tests.support.yard import Yard, eventually, said

SCRIPTED = {"agent": "scripted"}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[KubeApi]:
    async with open_api(tmp_path / "cluster") as api:
        yield api


@pytest.fixture
def settings(tmp_path: Path, database_url: str, run_settings: RunSettings, cluster: KubeApi) -> Settings:
    return make_settings(
        tmp_path / "data",
        database_url,
        runs=run_settings,
        sandbox=kube_settings(cluster).model_copy(update={"memory_mb": 512}),
    )


async def test_work_arrives_as_a_branch(live: Yard, shop: Path, repository: str, cluster: KubeApi) -> None:
    run = await live.api().start(
        "WRITE a.txt one\nSHELL ls /run/taskyard\nSAY done", repository=repository, **SCRIPTED
    )
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
    branch = body["output"]["head_branch"]
    assert run_git(shop, "show", f"{branch}:a.txt") == "one"
    log = await run.log()
    assert said(log) == "done"
    # The mirror was copied in for the clone, and is gone when the agent starts.
    assert "mirror.git" not in str(log)
    await eventually(_pods(cluster), lambda pods: pods == [], lambda pods: f"end of the pods {pods}")


async def test_a_message_to_a_run_that_goes_on(live: Yard, shop: Path, repository: str) -> None:
    run = await live.api().start("WRITE a.txt one", repository=repository, mode="interactive", **SCRIPTED)
    await run.turns(1)
    await run.command("user_message", content="SHELL cat a.txt\nWRITE b.txt two\nSAY again")
    assert said(await run.turns(2)).endswith("again")
    await run.cancel()
    assert len(heads(shop)) == 2


async def test_a_run_outlives_its_pod(live: Yard, repository: str, cluster: KubeApi) -> None:
    """Evicted in the middle of a turn: a new pod gets the checkpoint, and the turn goes on."""
    run = await live.api().start("WRITE a.txt one", repository=repository, mode="interactive", **SCRIPTED)
    await run.turns(1)
    await run.command("user_message", content="SAY before\nSLEEP 60")
    await run.shown("before")
    [first] = cluster.pods
    uid = cluster.pods[first].object["metadata"]["uid"]
    await cluster.evict(first, "The node was low on resource: memory.")
    await run.turns(2)  # the agent is told to go on, and ends it
    await run.command("user_message", content="SHELL grep -c one a.txt && echo it is there\nSAY after")
    log = await run.turns(3)
    assert said(log).endswith("after")
    assert "1\\nit is there" in json.dumps(log)
    assert [pod.object["metadata"]["uid"] for pod in cluster.pods.values()] != [uid]
    await run.cancel()


async def test_a_run_out_of_memory_says_so(live: Yard, cluster: KubeApi) -> None:
    """The kernel ends a program, and with it the kubelet its whole pod."""
    if not cluster.limits_memory:
        pytest.skip("this machine has no control groups: the stand-in cannot limit memory")
    run = await live.api().start("SAY before\nSHELL head -c 900000000 /dev/zero | tail\nSLEEP 60", **SCRIPTED)
    body = await run.status("failed", "completed")
    assert body["state"]["error_type"] == "oom"
    assert "TASKYARD_SANDBOX__MEMORY_MB" in body["error_message"]
    assert "before" in said(await run.log())


def _pods(cluster: KubeApi) -> Callable[[], Awaitable[list[str]]]:
    async def names() -> list[str]:
        return list(cluster.pods)

    return names
