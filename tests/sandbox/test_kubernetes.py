"""The provider for clusters: its pods, their files, their ends, and API servers that behave badly."""

from __future__ import annotations

import ast
import asyncio
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from aiohttp import web

from taskyard.errors import SetupError
from taskyard.sandbox import kubernetes, pod_checks, pods
from taskyard.sandbox.kubernetes import EvictedError, KubernetesProvider, KubernetesSandbox
from taskyard.sandbox.provider import (
    KilledError,
    Limits,
    LostError,
    Mount,
    Problem,
    Sandbox,
    SandboxError,
    Spec,
)
from taskyard.sandbox.selftest import selftest
from taskyard.settings import Settings
from taskyard.settings.sandboxes import KubernetesSettings, SandboxSettings
from tests.support.door import eventually
from tests.support.kube_api import NAMESPACE, Pod
from tests.support.kube_hut import KubeHut, kube_settings, open_kube_hut
from tests.support.sandboxes import LIMITS, first_line, gone, processes_with, run, shell

Json = dict[str, Any]
_naps = itertools.count(10)


@pytest.fixture
def nap() -> str:
    """Seconds that nobody else on this machine sleeps."""
    return f"8{os.getpid():07d}{next(_naps)}"


@pytest.fixture
async def hut(tmp_path: Path) -> AsyncIterator[KubeHut]:
    async with open_kube_hut(tmp_path / "data") as hut:
        yield hut


@pytest.fixture
async def sandbox(hut: KubeHut) -> Sandbox:
    return await hut.sandbox()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cluster needs minutes for."""
    monkeypatch.setattr(kubernetes, "GONE_S", 1.0)
    monkeypatch.setattr(kubernetes, "FATE_S", 3.0)
    monkeypatch.setattr(kubernetes, "PUT_DOWN_S", 10.0)


def only_pod(hut: KubeHut) -> Pod:
    [pod] = hut.api.pods.values()
    return pod


def wanted(**fields: Any) -> pods.Wanted:
    values = {"place": "p", "sandbox_id": "one", "made": "m", "limits": LIMITS, "image": "i", "seconds": 60}
    return pods.Wanted(**{**values, **fields})


class TestManifest:
    @pytest.mark.parametrize(
        "settings",
        [
            KubernetesSettings(),
            KubernetesSettings(
                runtime_class="gvisor",
                user_namespaces=False,
                image_pull_secret="registry",
                node_selector={"pool": "agents"},
            ),
        ],
    )
    @pytest.mark.parametrize("disk_mb", [None, 20_480])
    def test_it_is_valid(self, settings: KubernetesSettings, disk_mb: int | None) -> None:
        limits = Limits(cpus=0.5, memory_mb=512, pids=64, tmp_mb=64, disk_mb=disk_mb)
        manifest = pods.pod(wanted(limits=limits), settings)
        kubernetes_validate.validate(manifest, "1.37", strict=True)
        spec = manifest["spec"]
        assert spec.get("hostUsers") is (False if settings.user_namespaces else None)
        assert spec.get("runtimeClassName") == settings.runtime_class
        assert spec.get("nodeSelector", {}) == settings.node_selector

    def test_it_is_locked(self) -> None:
        """As the pod security standard `restricted` has it, and more."""
        manifest = pods.pod(wanted(limits=Limits(2, 512, 64, 64, disk_mb=1000)), KubernetesSettings())
        spec = manifest["spec"]
        [container] = spec["containers"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & spec.keys()
        assert not {"env", "envFrom", "ports", "lifecycle"} & container.keys()
        assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
        assert spec["restartPolicy"] == "Never"
        assert spec["securityContext"] == {
            "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "privileged": False, "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert [set(volume) for volume in spec["volumes"]] == [{"name", "emptyDir"}] * 5
        assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"])
        most, asked = container["resources"]["limits"], container["resources"]["requests"]
        assert (most["cpu"], most["memory"]) == (asked["cpu"], asked["memory"]) == ("2000m", "512Mi")
        # The kubelet comes after the provider's own watch, which leaves what the sandbox holds.
        assert int(most["ephemeral-storage"].removesuffix("Mi")) > 1000

    def test_names_and_labels_are_valid_whatever_the_id(self) -> None:
        ids = ["a", "A.B_C-", "x" * 100, "run.7", "9" * 64, "a..", "a.."[:2], "-".join("ab" * 30)]
        names = [pods.name_of("place", sandbox_id) for sandbox_id in ids]
        assert len(set(names)) == len(set(ids))
        assert pods.name_of("other place", "a") != names[0]
        for sandbox_id in ids:
            manifest = pods.pod(wanted(sandbox_id=sandbox_id), KubernetesSettings())
            kubernetes_validate.validate(manifest, "1.37", strict=True)
            metadata = manifest["metadata"]
            assert len(metadata["name"]) <= 63
            assert metadata["name"].replace("-", "").isalnum()
            for value in metadata["labels"].values():
                assert len(value) <= 63
                assert value[0].isalnum()
                assert value[-1].isalnum()
            assert metadata["annotations"][pods.ID] == sandbox_id


def test_what_runs_inside_is_for_older_interpreters_too() -> None:
    tree = ast.parse(pods.INSIDE, feature_version=(3, 9))
    imported = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert {str(name).partition(".")[0] for name in imported} <= sys.stdlib_module_names


class TestFiles:
    async def test_a_folder_and_a_file_are_copied_and_go_with_their_command(
        self, hut: KubeHut, sandbox: Sandbox, tmp_path: Path
    ) -> None:
        (tmp_path / "mirror" / "deep").mkdir(parents=True)
        (tmp_path / "mirror" / "deep" / "file").write_text("content")
        (tmp_path / "note").write_text("note")
        mounts = [
            Mount(tmp_path / "mirror", "/run/taskyard/mirror.git"),
            Mount(tmp_path / "note", "/run/taskyard/a/note"),
        ]
        done = await run(
            sandbox, "sh", "-c", "cat /run/taskyard/mirror.git/deep/file /run/taskyard/a/note", mounts=mounts
        )
        assert (done.output, done.end.code) == ("contentnote", 0)
        assert (await shell(sandbox, "find /run/taskyard -type f")).output == ""

    async def test_two_commands_share_a_copy(self, sandbox: Sandbox, tmp_path: Path) -> None:
        (tmp_path / "one").write_text("one")
        (tmp_path / "two").write_text("two")
        mount = Mount(tmp_path / "one", "/run/taskyard/file")
        script = "cat /run/taskyard/file; read -r _; cat /run/taskyard/file"
        first = await sandbox.exec(["sh", "-c", script], stdin=True, mounts=[mount])
        assert (await run(sandbox, "cat", "/run/taskyard/file", mounts=[mount])).output == "one"
        with pytest.raises(SandboxError, match="in use for"):
            await run(sandbox, "true", mounts=[Mount(tmp_path / "two", "/run/taskyard/file")])
        assert first.stdin is not None
        first.stdin.write(b"\n")
        assert await first.stdout.read() == b"oneone"
        await first.wait()
        other = Mount(tmp_path / "two", "/run/taskyard/file")
        assert (await run(sandbox, "cat", "/run/taskyard/file", mounts=[other])).output == "two"

    async def test_a_script_that_the_command_names(self, sandbox: Sandbox, tmp_path: Path) -> None:
        script = tmp_path / "agent.py"
        script.write_text("import sys; print(sys.argv)")
        done = await run(sandbox, "python3", "-I", str(script), "x", mounts=[Mount(script, str(script))])
        assert done.output == "['/run/taskyard/files/0/agent.py', 'x']\n"

    @pytest.mark.parametrize(
        ("target", "how", "said"),
        [
            ("/opt/tools", {}, "put it into the image"),
            ("/run/taskyard/x", {"writable": True}, "nothing writable"),
            ("/run/taskyard/x", {"symlink": True}, "no links"),
            ("/tmp/workspace/x", {}, "the sandbox's own"),
            ("/run/taskyard/../x", {}, "normal path"),
        ],
    )
    async def test_what_cannot_be(
        self, sandbox: Sandbox, tmp_path: Path, target: str, how: Json, said: str
    ) -> None:
        with pytest.raises(SandboxError, match=said):
            await run(sandbox, "true", mounts=[Mount(tmp_path, target, **how)])

    async def test_a_source_that_is_not_there(self, sandbox: Sandbox, tmp_path: Path) -> None:
        with pytest.raises(SandboxError, match="does not exist"):
            await run(sandbox, "true", mounts=[Mount(tmp_path / "no", "/run/taskyard/x")])

    async def test_temporary_files_go_when_nothing_runs(self, sandbox: Sandbox) -> None:
        process = await sandbox.exec(["sh", "-c", "echo mine > /tmp/file; echo; read -r _"], stdin=True)
        assert await first_line(process) == ""
        # Not under a command that runs.
        assert (await shell(sandbox, "mkdir -p /tmp/d/e; chmod 0 /tmp/d; cat /tmp/file")).output == "mine\n"
        await process.kill()
        assert (await shell(sandbox, "ls /tmp")).output == "workspace\n"


class TestEnds:
    async def test_one_is_killed_and_others_go_on(self, sandbox: Sandbox, nap: str) -> None:
        going = await sandbox.exec(["cat"], stdin=True)
        other = await sandbox.exec(["sh", "-c", f"setsid sleep {nap} & sleep {nap}"])
        await other.kill()
        assert processes_with(nap) == []
        assert going.stdin is not None
        going.stdin.write(b"still here\n")
        assert await first_line(going) == "still here"
        await going.kill()

    async def test_a_carrier_that_the_agent_kills(self, sandbox: Sandbox, nap: str) -> None:
        """What it carried has no parent any more, and is ended all the same."""
        process = await sandbox.exec(["sh", "-c", f"setsid sleep {nap} & kill -9 $PPID; exec sleep {nap}"])
        async with asyncio.timeout(60):
            end = await process.wait()
        assert (end.code, end.reason) == (137, "killed")
        assert processes_with(nap) == []
        assert (await shell(sandbox, "echo fine")).output == "fine\n"

    async def test_an_agent_that_kills_whoever_ends_it(
        self, hut: KubeHut, sandbox: Sandbox, nap: str
    ) -> None:
        """It lives as long as its pod, and that is not long."""
        script = f"""
trap '' TERM HUP
(while :; do for p in /proc/[0-9]*; do
  case $(tr '\\0' ' ' < $p/cmdline 2>/dev/null) in *' end '*) kill -9 ${{p#/proc/}};; esac
done; done) 2>/dev/null &
echo on; exec sleep {nap}
"""
        process = await sandbox.exec(["sh", "-c", script])
        assert await first_line(process) == "on"
        async with asyncio.timeout(90):
            await process.kill()
        assert processes_with(nap) == []
        try:
            assert (await shell(sandbox, "echo fine")).output == "fine\n"
        except LostError:
            # Removed, which takes a moment, or ended because its main process was killed, too.
            pods = hut.api.pods
            await eventually(
                lambda: all(pod.object["status"]["phase"] == "Failed" for pod in pods.values()),
                "end of the pod",
            )

    async def test_nobody_writes_in_the_name_of_what_ends_commands(self, sandbox: Sandbox) -> None:
        """The main process and the ends of commands are shut to others of their user."""
        script = (
            "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline | tail -c 30 | tr '\\n' ' '; echo $p; done"
        )
        found = [line.split() for line in (await shell(sandbox, script)).lines]
        # The first process of bubblewrap names the same command.
        keeper = max(int(words[-1].removeprefix("/proc/")) for words in found if "keep" in words)
        done = await shell(
            sandbox, f"ls -l /proc/{keeper}/fd; cat /proc/{keeper}/environ; echo > /proc/{keeper}/fd/1"
        )
        assert done.end.code != 0
        assert done.output == ""
        assert "Permission denied" in done.end.stderr_tail

    async def test_a_stream_that_breaks(self, hut: KubeHut, sandbox: Sandbox, nap: str) -> None:
        process = await sandbox.exec(
            ["sh", "-c", f"trap '' TERM HUP; echo on; setsid sleep {nap} & sleep {nap}"]
        )
        assert await first_line(process) == "on"
        await hut.api.break_streams(only_pod(hut).name)
        async with asyncio.timeout(60):
            end = await process.wait()
        assert (end.code, end.reason) == (137, "killed")
        assert "connection to the sandbox broke" in end.stderr_tail
        assert processes_with(nap) == []
        assert (await shell(sandbox, "echo fine")).output == "fine\n"

    @pytest.mark.parametrize(
        ("status", "reason", "error"),
        [
            (
                {"reason": "Evicted", "message": "The node was low on resource: memory."},
                "killed",
                EvictedError,
            ),
            (
                {"reason": "Evicted", "message": 'Usage of EmptyDir volume "workspace" exceeds the limit'},
                "disk",
                LostError,
            ),
            (
                {"reason": "Evicted", "message": "Pod ephemeral local storage usage exceeds the total limit"},
                "disk",
                LostError,
            ),
            ({"reason": "DeadlineExceeded"}, "timeout", LostError),
            (
                {"containerStatuses": [{"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]},
                "oom",
                LostError,
            ),
        ],
    )
    async def test_a_pod_that_ends(
        self, hut: KubeHut, sandbox: Sandbox, status: Json, reason: str, error: type[SandboxError]
    ) -> None:
        process = await sandbox.exec(["sh", "-c", "echo on; sleep 600"])
        assert await first_line(process) == "on"
        await hut.api.fail(only_pod(hut).name, {"phase": "Failed", **status})
        async with asyncio.timeout(60):
            assert (await process.wait()).reason == reason
        with pytest.raises(error, match="is gone"):
            await run(sandbox, "true")
        await sandbox.detach()
        assert await hut.provider.attach("one") is None
        assert await hut.provider.list() == []
        assert hut.api.pods == {}

    async def test_one_process_that_ran_out_of_memory(
        self, hut: KubeHut, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the kubelet does not end the whole pod for it, the container's counters tell."""
        counters = b"/tmp/workspace/memory.events"
        there = pods.INSIDE.replace(b"/sys/fs/cgroup/memory.events", counters.ljust(28))
        assert there != pods.INSIDE
        assert len(there) == len(pods.INSIDE)
        monkeypatch.setattr(pods, "INSIDE", there)
        script = "printf 'oom 9\\noom_kill %s\\n' $0 > memory.events; kill -9 $$"
        ends = [(await run(sandbox, "sh", "-c", script, number)).end.reason for number in ("1", "1", "2")]
        assert ends == ["oom", "killed", "oom"]
        assert (await shell(sandbox, "echo fine")).output == "fine\n"

    async def test_a_pod_that_vanishes(self, hut: KubeHut, sandbox: Sandbox) -> None:
        """Its node was lost, and the cluster has forgotten it."""
        process = await sandbox.exec(["sh", "-c", "echo on; sleep 600"])
        assert await first_line(process) == "on"
        await hut.api._remove(only_pod(hut))
        async with asyncio.timeout(60):
            assert (await process.wait()).reason == "killed"
        with pytest.raises(EvictedError):
            await run(sandbox, "true")

    async def test_what_cannot_be_ended_goes_with_its_pod(
        self, hut: KubeHut, sandbox: Sandbox, nap: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = await sandbox.exec(["sh", "-c", f"echo on; sleep {nap}"])
        assert await first_line(process) == "on"
        hut.api.faults.append(_refuse(lambda request: request.path.endswith("/exec"), 500))
        async with asyncio.timeout(90):
            await process.kill()
        assert processes_with(nap) == []
        assert hut.api.pods == {}

    async def test_a_node_that_is_lost(self, hut: KubeHut, sandbox: Sandbox) -> None:
        """It does not say that the pod has ended: in the end it is forced."""
        hut.api.never_removed = True
        await sandbox.destroy()
        assert hut.api.pods == {}

    async def test_a_killed_server_leaves_no_process_and_its_sandbox_can_be_taken_over(
        self, hut: KubeHut, nap: str
    ) -> None:
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LEFT_BEHIND, str(hut.folder), str(hut.provider.settings.kubeconfig), nap,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert server.stdout is not None
        async with asyncio.timeout(120):
            assert await server.stdout.readline() == b"ready\n"
            with pytest.raises(SandboxError, match="in use by another process"):
                await hut.provider.attach("left")
            assert len(processes_with(nap)) > 0
            server.kill()
            await server.communicate()
        await gone(nap)
        sandbox = await hut.provider.attach("left")
        assert sandbox is not None
        hut.made.append(sandbox)
        assert (await shell(sandbox, "cat file")).output == "work\n"

    async def test_attaching_ends_what_still_runs(self, hut: KubeHut, sandbox: Sandbox, nap: str) -> None:
        """Also what hides from those that look after lost commands."""
        await (await sandbox.exec(["true"])).wait()
        pod = only_pod(hut)
        stray = await asyncio.create_subprocess_exec(
            *hut.api._entering(pod, ["sleep", nap]), stdin=asyncio.subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not processes_with(nap):
            assert time.monotonic() < deadline, "the stray does not start"
            await asyncio.sleep(0.01)
        await sandbox.detach()
        again = await hut.provider.attach("one")
        assert again is not None
        hut.made.append(again)
        assert await stray.wait() != 0


LEFT_BEHIND = """
import asyncio, sys
from pathlib import Path
from taskyard.sandbox.kubernetes import KubernetesProvider
from taskyard.sandbox.provider import Limits, Spec
from taskyard.settings import Settings
from taskyard.settings.sandboxes import KubernetesSettings, SandboxSettings

async def main():
    kubernetes = KubernetesSettings(namespace="taskyard-sandboxes", kubeconfig=Path(sys.argv[2]))
    sandbox = SandboxSettings(provider="kubernetes", kubernetes=kubernetes)
    provider = KubernetesProvider(Settings(_env_file=None, data_dir=Path(sys.argv[1]), sandbox=sandbox))
    sandbox = await provider.create(Spec("left", Limits(1, 256, 64, 16)))
    nap = sys.argv[3]
    script = f"trap '' TERM HUP; echo work > file; setsid sleep {nap} & echo ready; exec sleep {nap}"
    process = await sandbox.exec(["sh", "-c", script])
    print((await process.stdout.readline()).decode().strip(), flush=True)
    await process.wait()

asyncio.run(main())
"""


def _refuse(concerns: Callable[[web.Request], bool], code: int, times: int = 1_000_000) -> Any:
    left = times

    async def fault(request: web.Request) -> web.StreamResponse | None:
        nonlocal left
        if left <= 0 or not concerns(request):
            return None
        left -= 1
        return web.json_response(
            {"kind": "Status", "code": code, "message": f"told to say {code}"}, status=code
        )

    return fault


class TestOddServers:
    async def test_a_pod_that_a_dead_server_left_is_replaced(self, hut: KubeHut) -> None:
        sandbox = await hut.sandbox()
        await shell(sandbox, "echo old > file")
        uid = only_pod(hut).object["metadata"]["uid"]
        await sandbox.detach()
        for path in sorted((hut.folder / "sandboxes").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (hut.folder / "sandboxes").rmdir()
        again = await hut.sandbox()
        assert (await shell(again, "ls")).output == ""
        assert only_pod(hut).object["metadata"]["uid"] != uid

    async def test_an_answer_that_is_lost(self, hut: KubeHut) -> None:
        """The pod was made, and nobody was told: it is not made twice."""
        lost = False

        async def fault(request: web.Request) -> web.StreamResponse | None:
            nonlocal lost
            if request.method != "POST" or lost:
                return None
            lost = True
            await hut.api._create(await request.json())
            return web.json_response({}, status=504)

        hut.api.faults.append(fault)
        sandbox = await hut.sandbox()
        assert (await shell(sandbox, "echo fine")).output == "fine\n"
        assert len([entry for entry in hut.api._history if entry[1] == "ADDED"]) == 1

    async def test_a_server_that_is_busy_is_asked_again(self, hut: KubeHut) -> None:
        for code in (429, 500, 503):
            hut.api.faults.append(_refuse(lambda request: True, code, times=1))
        sandbox = await hut.sandbox()
        hut.api.faults.append(_refuse(lambda request: request.path.endswith("/exec"), 503, times=2))
        assert (await shell(sandbox, "echo fine")).output == "fine\n"

    async def test_a_server_that_restarts_while_a_pod_starts(self, hut: KubeHut) -> None:
        left = 9

        async def away(request: web.Request) -> web.StreamResponse | None:
            nonlocal left
            if request.method == "POST" or left == 0:
                return None
            left -= 1
            assert request.transport is not None
            request.transport.abort()
            return None

        hut.api.faults.append(away)
        sandbox = await hut.sandbox()
        assert left == 0
        assert (await shell(sandbox, "echo fine")).output == "fine\n"

    @pytest.mark.parametrize("kind", ["410", "ends", "nonsense", "breaks"])
    async def test_watches_that_do_not_work(self, hut: KubeHut, kind: str) -> None:
        watches = 0

        async def fault(request: web.Request) -> web.StreamResponse | None:
            nonlocal watches
            if request.query.get("watch") != "true":
                return None
            watches += 1
            response = web.StreamResponse()
            await response.prepare(request)
            if kind == "410":
                status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
                await response.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
            elif kind == "nonsense":
                await response.write(b"<html>\n")
            elif kind == "breaks":
                assert request.transport is not None
                request.transport.abort()
            return response

        hut.api.faults.append(fault)
        begun = time.monotonic()
        sandbox = await hut.sandbox()
        assert (await shell(sandbox, "echo fine")).output == "fine\n"
        assert 0 < watches <= 4 * (time.monotonic() - begun) + 2, "it is asked without a pause"

    async def test_an_image_that_is_not_there(self, hut: KubeHut) -> None:
        hut.api.missing_images.add("acme/none:1")
        with pytest.raises(SandboxError, match=r"does not start: ImagePullBackOff, no image acme/none:1"):
            await hut.provider.create(Spec("one", LIMITS, image="acme/none:1"))
        assert hut.api.pods == {}
        assert await hut.provider.list() == []

    async def test_no_room(self, tmp_path: Path) -> None:
        async with open_kube_hut(tmp_path / "data", start_s=1) as hut:
            hut.api.unschedulable = True
            with pytest.raises(
                SandboxError, match=r"not ready after 1 seconds: Unschedulable, .*Insufficient cpu"
            ):
                await hut.sandbox()
            assert hut.api.pods == {}

    async def test_a_quota(self, hut: KubeHut) -> None:
        async def fault(request: web.Request) -> web.StreamResponse | None:
            if request.method != "POST":
                return None
            said = 'pods "x" is forbidden: exceeded quota: sandboxes, used: pods=20, limited: pods=20'
            return web.json_response({"kind": "Status", "code": 403, "message": said}, status=403)

        hut.api.faults.append(fault)
        with pytest.raises(SandboxError, match="exceeded quota: sandboxes"):
            await hut.sandbox()
        assert await hut.provider.list() == []

    async def test_a_command_that_the_engine_cannot_start(self, hut: KubeHut, sandbox: Sandbox) -> None:
        """As an image without Python has it: the status at the end says why."""

        async def fault(request: web.Request) -> web.StreamResponse | None:
            if not request.path.endswith("/exec"):
                return None
            channel = web.WebSocketResponse(protocols=["v4.channel.k8s.io"])
            await channel.prepare(request)
            said = 'exec: "python3": executable file not found in $PATH'
            status = {"status": "Failure", "reason": "InternalError", "message": said}
            await channel.send_bytes(b"\x03" + json.dumps(status).encode())
            await channel.close()
            return channel

        hut.api.faults.append(fault)
        said = r'does not start: exec: "python3": executable file not found'
        with pytest.raises(SandboxError, match=said) as caught:
            await run(sandbox, "true")
        assert not isinstance(caught.value, KilledError), "it would be tried again"
        hut.api.faults.clear()

    async def test_a_server_that_goes_away(
        self, hut: KubeHut, sandbox: Sandbox, nap: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kubernetes, "PUT_DOWN_S", 2.0)
        process = await sandbox.exec(["sh", "-c", f"echo on; sleep {nap}"])
        assert await first_line(process) == "on"

        async def away(request: web.Request) -> web.StreamResponse | None:
            assert request.transport is not None
            request.transport.abort()
            return None

        hut.api.faults.append(away)
        await hut.api.break_streams(only_pod(hut).name)
        async with asyncio.timeout(90):
            assert (await process.wait()).reason == "killed"
            with pytest.raises(SandboxError, match="cannot be reached"):
                await run(sandbox, "true")
            with pytest.raises(SandboxError, match="cannot be reached"):
                await sandbox.destroy()
        # Without the server, too: the carrier's input has ended.
        await gone(nap)
        swept = await hut.provider.sweep(_keep_none)
        assert swept.sandboxes == []
        hut.api.faults.clear()
        await sandbox.destroy()
        assert hut.api.pods == {}
        assert await hut.provider.list() == []

    async def test_no_server(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(
            json.dumps({
                "apiVersion": "v1", "kind": "Config", "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "u", "user": {"token": "x"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            })
        )  # fmt: skip
        provider = provider_of(tmp_path, kubeconfig=kubeconfig)
        with pytest.raises(SandboxError, match=rf"http://127.0.0.1:{port} cannot be reached"):
            await provider.create(Spec("one", LIMITS))
        [problem] = await provider.check()
        assert problem.fatal
        assert "cannot be reached" in problem.detail
        await provider.close()


def provider_of(folder: Path, **fields: Any) -> KubernetesProvider:
    sandbox = SandboxSettings(provider="kubernetes", kubernetes=KubernetesSettings(**fields))
    return KubernetesProvider(Settings(_env_file=None, data_dir=folder / "data", sandbox=sandbox))


class TestSetUp:
    async def test_without_the_client(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "kubernetes_asyncio", None)
        provider = provider_of(tmp_path)
        with pytest.raises(SetupError, match=r"pip install taskyard\[kubernetes\]"):
            await provider.capabilities()
        [problem] = await provider.check()
        assert problem.fatal

    @pytest.mark.parametrize("content", [None, "", "a: [", "{}"])
    async def test_without_a_cluster(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "config").write_text(content)
        provider = provider_of(tmp_path, kubeconfig=tmp_path / "config")
        with pytest.raises(SetupError, match="the cluster cannot be found"):
            await provider.create(Spec("one", LIMITS))
        await provider.close()

    async def test_a_context_that_is_not_there(self, hut: KubeHut, tmp_path: Path) -> None:
        provider = provider_of(tmp_path, kubeconfig=hut.api.kubeconfig(), context="prod")
        with pytest.raises(SetupError, match="prod"):
            await provider.capabilities()
        await provider.close()

    async def test_a_wrong_token_is_not_told(self, hut: KubeHut, tmp_path: Path) -> None:
        kubeconfig = hut.api.kubeconfig(token="secret-token")
        provider = provider_of(tmp_path, kubeconfig=kubeconfig, namespace=NAMESPACE)
        with pytest.raises(SandboxError, match=r"401.*credentials of the worker") as caught:
            await provider.create(Spec("one", LIMITS))
        assert "secret-token" not in str(caught.value)
        await provider.close()

    async def test_a_kernel_of_its_own(self, hut: KubeHut, tmp_path: Path) -> None:
        assert "kernel" not in await hut.provider.capabilities()
        provider = provider_of(tmp_path, kubeconfig=hut.api.kubeconfig(), runtime_class="gvisor")
        assert "kernel" in await provider.capabilities()
        assert "pids" not in await provider.capabilities()
        await provider.close()


class TestChecks:
    async def test_all_is_well(self, hut: KubeHut) -> None:
        problems = await hut.provider.check()
        assert {problem.name for problem in problems if not problem.ok} == {"sandbox processes"}
        assert not any(problem.fatal for problem in problems if not problem.ok)
        assert [problem for problem in await selftest(hut.provider) if not problem.ok] == []
        assert hut.api.pods == {}

    async def test_rights(self, hut: KubeHut) -> None:
        hut.api.rights -= {("create", "", "pods/exec"), ("delete", "", "pods")}
        problem = await self.fatal(hut)
        assert problem.name == "Kubernetes rights"
        assert "delete pods, create pods/exec" in problem.detail
        assert "deploy/kubernetes" in problem.remedy

    async def test_no_network_policy(self, hut: KubeHut) -> None:
        hut.api.policies.clear()
        assert (await self.fatal(hut)).name == "network policy"

    async def test_a_network_policy_that_opens(self, hut: KubeHut) -> None:
        spec = {"podSelector": {"matchLabels": {pods.MANAGED_BY: "taskyard"}}, "egress": [{}]}
        hut.api.policies.append({"metadata": {"name": "dns"}, "spec": spec})
        problem = await self.fatal(hut)
        assert problem.detail == f"dns of the namespace {NAMESPACE} allows sandboxes some traffic"

    async def test_network_policies_that_may_not_be_seen(self, hut: KubeHut) -> None:
        hut.api.rights.discard(("list", "networking.k8s.io", "networkpolicies"))
        [problem] = [problem for problem in await hut.provider.check() if problem.name == "network policy"]
        assert (problem.ok, problem.fatal) == (False, False)

    async def test_a_cluster_that_does_not_enforce_them(self, hut: KubeHut) -> None:
        hut.api.closed = False
        problem = await self.fatal(hut)
        assert problem.name == "sandbox network"
        assert hut.api.url.removeprefix("http://") in problem.detail

    async def test_an_image_that_lacks_programs(self, hut: KubeHut, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pod_checks, "PROGRAMS", ("sh", "no-such-program"))
        problem = await self.fatal(hut)
        assert (problem.name, "no-such-program" in problem.detail) == ("sandbox image", True)

    async def test_an_image_that_is_not_there(self, hut: KubeHut) -> None:
        hut.api.missing_images.add("taskyard-agent")
        problem = await self.fatal(hut)
        assert problem.name == "sandbox start"
        assert "taskyard-agent" in problem.remedy

    async def fatal(self, hut: KubeHut) -> Problem:
        [problem] = [p for p in await hut.provider.check() if p.fatal and not p.ok]
        assert hut.api.pods == {}
        return problem

    @pytest.mark.parametrize(
        ("spec", "closed"),
        [
            ({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}, True),
            ({"podSelector": {"matchLabels": pods.OURS}, "policyTypes": ["Egress", "Ingress"]}, True),
            ({"podSelector": {}, "policyTypes": ["Egress"]}, False),
            ({"podSelector": {}}, False),
            (
                {
                    "podSelector": {"matchLabels": {"taskyard/place": "x"}},
                    "policyTypes": ["Ingress", "Egress"],
                },
                False,
            ),
            (
                {
                    "podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists"}]},
                    "policyTypes": ["Ingress", "Egress"],
                },
                False,
            ),
            ({"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "egress": [{}]}, False),
        ],
    )
    def test_what_closes(self, spec: Json, closed: bool) -> None:
        assert pod_checks.closes(spec) is closed


class TestRightsAndSweep:
    async def test_every_right_of_the_role_is_needed_and_no_other(self, hut: KubeHut) -> None:
        await hut.provider.check()
        await (await hut.sandbox()).detach()
        await hut.provider.sweep(_keep_none)
        assert hut.api.used == hut.api.rights

    async def test_no_argument_or_variable_reaches_the_api(self, hut: KubeHut, sandbox: Sandbox) -> None:
        env = {"SECRET": "hidden-in-the-environment"}
        done = await run(sandbox, "sh", "-c", "echo $SECRET hidden-in-the-arguments", env=env)
        assert done.output == "hidden-in-the-environment hidden-in-the-arguments\n"
        assert "hidden" not in json.dumps(only_pod(hut).object)
        assert "hidden" not in json.dumps(only_pod(hut).execs)
        assert "hidden" not in json.dumps(hut.api.requests)

    async def test_pods_without_a_folder_are_swept(self, hut: KubeHut, tmp_path: Path) -> None:
        held = await hut.sandbox("held")
        await hut.sandbox("lost.")
        other = KubernetesProvider(
            Settings(_env_file=None, data_dir=tmp_path / "other", sandbox=kube_settings(hut.api))
        )
        elsewhere = await other.create(Spec("held", LIMITS))
        lost = hut.made.pop()
        assert isinstance(lost, KubernetesSandbox)
        await lost.detach()
        await lost.hold.remove()
        swept = await hut.provider.sweep(_keep_none)
        assert swept.sandboxes == ["lost."]
        assert len(hut.api.pods) == 2
        assert (await shell(held, "echo fine")).output == "fine\n"
        assert (await shell(elsewhere, "echo fine")).output == "fine\n"
        await elsewhere.destroy()
        await other.close()

    @pytest.mark.parametrize(("minutes", "left"), [(5, 1), (15, 0)])
    async def test_pods_of_others_go_some_time_after_their_end(
        self, hut: KubeHut, tmp_path: Path, minutes: int, left: int
    ) -> None:
        other = KubernetesProvider(
            Settings(_env_file=None, data_dir=tmp_path / "other", sandbox=kube_settings(hut.api))
        )
        sandbox = await other.create(Spec("theirs", LIMITS))
        end = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()
        state = {"terminated": {"reason": "Error", "exitCode": 1, "finishedAt": end}}
        await hut.api.fail(only_pod(hut).name, {"phase": "Failed", "containerStatuses": [{"state": state}]})
        await hut.provider.sweep(_keep_none)
        assert len(hut.api.pods) == left
        await sandbox.destroy()
        await other.close()

    async def test_several_sweeps_at_once(self, hut: KubeHut) -> None:
        for name in ("one", "two"):
            await (await hut.sandbox(name)).detach()
        results = await asyncio.gather(*(hut.provider.sweep(_keep_none) for _ in range(3)))
        assert sorted({name for swept in results for name in swept.sandboxes}) == ["one", "two"]
        assert hut.api.pods == {}


async def _keep_none(names: object) -> set[str]:
    return set()


@pytest.mark.skipif(
    "TASKYARD_TEST_KUBECONFIG" not in os.environ,
    reason="TASKYARD_TEST_KUBECONFIG names no cluster (namespace taskyard-sandboxes, as deploy/kubernetes makes it)",
)
async def test_a_real_cluster(tmp_path: Path, nap: str) -> None:
    """TASKYARD_TEST_KUBE_IMAGE: the image; TASKYARD_TEST_KUBE_USERNS=false: the cluster has no user namespaces."""
    provider = provider_of(
        tmp_path,
        kubeconfig=Path(os.environ["TASKYARD_TEST_KUBECONFIG"]),
        namespace=NAMESPACE,
        image=os.environ.get("TASKYARD_TEST_KUBE_IMAGE", "taskyard-agent"),
        user_namespaces=os.environ.get("TASKYARD_TEST_KUBE_USERNS") != "false",
    )
    problems = [*await provider.check(), *await selftest(provider)]
    assert [problem for problem in problems if problem.fatal and not problem.ok] == []
    sandbox = await provider.create(Spec("real", LIMITS))
    try:
        (tmp_path / "file").write_text("copied")
        mount = Mount(tmp_path / "file", "/run/taskyard/file")
        assert (await run(sandbox, "cat", "/run/taskyard/file", mounts=[mount])).output == "copied"
        process = await sandbox.exec(["sh", "-c", f"echo on; setsid sleep {nap} & sleep {nap}"])
        assert await first_line(process) == "on"
        await process.kill()
        done = await shell(sandbox, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; echo w > file")
        assert nap not in done.output
        await sandbox.detach()
        again = await provider.attach("real")
        assert again is not None
        sandbox = again
        assert (await shell(sandbox, "cat file")).output == "w\n"
        end = (await run(sandbox, "python3", "-c", "x = bytearray(900_000_000)")).end
        assert end.reason == "oom"
    finally:
        await sandbox.destroy()
        await provider.close()
