"""A stand-in for a Kubernetes cluster: the part of the API that sandboxes use, over HTTP, with pods that really run.

Each pod is a bubblewrap sandbox of our own, whose folders persist; its main process runs in it, and an `exec` enters
its namespaces as a container engine does: the process has no parent there, and is not ended by the end of its
stream. Not as in a pod: a system-call filter for what is entered, an image, scheduling, the real network.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from aiohttp import WSMsgType, web

from taskyard.sandbox import launch
from taskyard.sandbox.bubblewrap import BubblewrapProvider, BubblewrapSandbox
from taskyard.sandbox.process import BubblewrapProcess, _children, _pid_of
from taskyard.sandbox.provider import Limits, Mount, Spec
from taskyard.settings import Settings

Json = dict[str, Any]
Fault = Callable[[web.Request], Awaitable[web.StreamResponse | None]]

DEPLOY = Path(__file__).parents[2] / "deploy" / "kubernetes"
NAMESPACE = "taskyard-sandboxes"
PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
LATE_S = 5.0
LOOK_S = 0.1
STATUSES = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "AlreadyExists"}


class ApiError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    def status(self) -> Json:
        return {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": self.code,
            "message": str(self), "reason": STATUSES.get(self.code, "InternalError"),
        }  # fmt: skip


@dataclass(eq=False)
class Pod:
    """A pod, and what runs it."""

    object: Json
    sandbox: BubblewrapSandbox | None = None
    main: BubblewrapProcess | None = None
    pid: int = 0
    """Of the main process, on the host."""
    oom_kills: int = 0
    execs: list[list[str]] = field(default_factory=list)
    """The commands that were started in it."""
    running: int = 0
    sockets: set[web.WebSocketResponse] = field(default_factory=set)

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])


class KubeApi:
    """The cluster. What tests do to it is in its fields."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, mode=0o700)
        self.folder = folder
        self.token = secrets.token_hex(16)
        self.url = ""
        self.pods: dict[str, Pod] = {}
        self.faults: list[Fault] = []
        """Asked in turn before each request; an answer is given in place of ours."""
        self.missing_images: set[str] = set()
        self.unschedulable = False
        self.never_removed = False
        """As on a node that is lost: only what is forced goes."""
        self.closed = True
        """Whether network policies are enforced."""
        self.requests: list[str] = []
        self.rights = rights_of(DEPLOY / "rbac.yaml", "taskyard-sandboxes")
        self.policies: list[Json] = [
            document
            for document in documents(DEPLOY / "sandboxes.yaml")
            if document["kind"] == "NetworkPolicy"
        ]
        self.limits_memory = False
        """Whether a pod that uses more than it may is ended; set when it is known."""
        self.used: set[tuple[str, str, str]] = set()
        """Rights that were needed."""
        self._version = 100
        self._history: list[tuple[int, str, Json]] = []
        self._news = asyncio.Condition()
        self._provider = BubblewrapProvider(Settings(_env_file=None, data_dir=folder / "node"))
        self._tasks: set[asyncio.Task[None]] = set()

    def kubeconfig(self, token: str | None = None) -> Path:
        """A file that names this cluster."""
        path = self.folder / f"kubeconfig-{secrets.token_hex(4)}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "worker", "user": {"token": token or self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "worker"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # --- what happens to pods ---

    async def evict(self, name: str, message: str) -> None:
        await self.fail(name, {"phase": "Failed", "reason": "Evicted", "message": message})

    async def fail(self, name: str, status: Json) -> None:
        """End all that runs in a pod, and say why."""
        pod = self.pods[name]
        sandbox, pod.sandbox = pod.sandbox, None
        await self._set(pod, status)
        if sandbox is not None:
            await sandbox.destroy()

    async def break_streams(self, name: str) -> None:
        """The connections of commands break, without a word; the commands go on."""
        for socket in list(self.pods[name].sockets):
            request = socket._req
            assert request is not None
            assert request.transport is not None
            request.transport.abort()

    async def _set(self, pod: Pod, status: Json) -> None:
        pod.object["status"] = status
        await self._tell("MODIFIED", pod)

    async def _tell(self, kind: str, pod: Pod) -> None:
        async with self._news:
            self._version += 1
            pod.object["metadata"]["resourceVersion"] = str(self._version)
            self._history.append((self._version, kind, json.loads(json.dumps(pod.object))))
            self._news.notify_all()

    async def _run(self, pod: Pod) -> None:
        """The kubelet: from pending to running to the end."""
        spec = pod.object["spec"]
        [container] = spec["containers"]
        if self.unschedulable:
            condition = {
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": "0/3 nodes are available: 3 Insufficient cpu.",
            }  # fmt: skip
            await self._set(pod, {"phase": "Pending", "conditions": [condition]})
            return
        if container["image"] in self.missing_images:
            for reason in ("ErrImagePull", "ImagePullBackOff"):
                waiting = {"reason": reason, "message": f"no image {container['image']}"}
                state = {"name": container["name"], "state": {"waiting": waiting}}
                await self._set(pod, {"phase": "Pending", "containerStatuses": [state]})
            return
        sandbox = await self._provider.create(Spec(pod.name, limits_of(spec)))
        place = self.folder / f"place-{pod.object['metadata']['uid']}"
        place.mkdir()
        if (identity := sandbox._folder.identity) is not None:
            os.chown(place, identity.uid, identity.gid)
        pod.sandbox = sandbox
        mount = Mount(place, "/run/taskyard", writable=True)
        pod.main = await sandbox.exec(container["command"], mounts=[mount], cwd="/")
        pod.pid = await _main_of(pod.main)
        await self._set(
            pod,
            {
                "phase": "Running",
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": container["name"], "state": {"running": {}}}],
            },
        )
        ending = asyncio.ensure_future(pod.main.wait())
        while not ending.done():
            await asyncio.wait({ending}, timeout=LOOK_S)
            await self._look_for_oom(pod)
        end = await ending
        if pod.sandbox is not None:
            await self.fail(pod.name, {"phase": "Failed" if end.code else "Succeeded"})

    async def _remove(self, pod: Pod) -> None:
        sandbox, pod.sandbox = pod.sandbox, None
        if sandbox is not None:
            await sandbox.destroy()
        if self.pods.get(pod.name) is pod:
            del self.pods[pod.name]
            await self._tell("DELETED", pod)

    def _keep(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_for_oom(self, pod: Pod) -> bool:
        """A kubelet ends the whole container when one of its processes ran out of memory (memory.oom.group)."""
        if pod.sandbox is None or pod.sandbox._oom_kills() <= pod.oom_kills:
            return False
        pod.oom_kills = pod.sandbox._oom_kills()
        state = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
        await self.fail(
            pod.name, {"phase": "Failed", "containerStatuses": [{"name": "sandbox", "state": state}]}
        )
        return True

    # --- the API ---

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.raw_path}")
        for fault in list(self.faults):
            if (response := await fault(request)) is not None:
                return response
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response(ApiError(401, "Unauthorized").status(), status=401)
        try:
            return await self._route(request)
        except ApiError as error:
            return web.json_response(error.status(), status=error.code)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        path, method = request.path, request.method
        if path == "/version":
            return web.json_response({"gitVersion": "v1.37.0"})
        if path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            asked = (await request.json())["spec"]["resourceAttributes"]
            resource = asked["resource"] + (f"/{asked['subresource']}" if asked["subresource"] else "")
            right = (asked["verb"], asked["group"], resource)
            allowed = asked["namespace"] == NAMESPACE and right in self.rights
            return web.json_response({"status": {"allowed": allowed}}, status=201)
        if path == f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies":
            self._allow("list", "networking.k8s.io", "networkpolicies")
            return web.json_response({"items": self.policies})
        base = f"/api/v1/namespaces/{NAMESPACE}/pods"
        if not path.startswith(base):
            raise ApiError(403, f"User worker cannot {method} {path}")
        _, _, rest = path[len(base) :].partition("/")
        name, _, part = rest.partition("/")
        if part == "exec":
            self._allow("get", "", "pods/exec")
            self._allow("create", "", "pods/exec")
            return await self._exec(request, self._pod(name))
        if method == "GET" and name:
            self._allow("get", "", "pods")
            return web.json_response(self._pod(name).object)
        if method == "GET":
            watch = request.query.get("watch") == "true"
            self._allow("watch" if watch else "list", "", "pods")
            return await self._watch(request) if watch else self._list(request)
        if method == "POST":
            self._allow("create", "", "pods")
            return await self._create(await request.json())
        if method == "DELETE" and name:
            self._allow("delete", "", "pods")
            return await self._delete(self._pod(name), await request.json())
        raise ApiError(403, f"User worker cannot {method} {path}")

    def _allow(self, verb: str, group: str, resource: str) -> None:
        self.used.add((verb, group, resource))
        if (verb, group, resource) not in self.rights:
            raise ApiError(403, f'{resource} is forbidden: User "worker" cannot {verb} resource "{resource}"')

    def _pod(self, name: str) -> Pod:
        if name not in self.pods:
            raise ApiError(404, f'pods "{name}" not found')
        return self.pods[name]

    def _list(self, request: web.Request) -> web.Response:
        wanted = [word.split("=", 1) for word in request.query.get("labelSelector", "").split(",") if word]
        items = [
            pod.object
            for pod in self.pods.values()
            if all(pod.object["metadata"]["labels"].get(key) == value for key, value in wanted)
        ]
        return web.json_response({"items": items, "metadata": {"resourceVersion": str(self._version)}})

    async def _create(self, pod: Json) -> web.Response:
        try:
            kubernetes_validate.validate(pod, "1.37", strict=True)
        except kubernetes_validate.ValidationError as error:
            raise ApiError(400, str(error)) from error
        name = pod["metadata"]["name"]
        if name in self.pods:
            raise ApiError(409, f'pods "{name}" already exists')
        made = datetime.now(UTC).isoformat()
        pod["metadata"] |= {"uid": secrets.token_hex(8), "creationTimestamp": made}
        pod["status"] = {"phase": "Pending"}
        self.pods[name] = Pod(pod)
        await self._tell("ADDED", self.pods[name])
        self._keep(self._run(self.pods[name]))
        return web.json_response(pod, status=201)

    async def _delete(self, pod: Pod, body: Json) -> web.Response:
        uid = body.get("preconditions", {}).get("uid")
        if uid not in (None, pod.object["metadata"]["uid"]):
            raise ApiError(409, "the UID in the precondition is another")
        pod.object["metadata"]["deletionTimestamp"] = datetime.now(UTC).isoformat()
        await self._tell("MODIFIED", pod)
        if not self.never_removed or body.get("gracePeriodSeconds") == 0:
            self._keep(self._remove(pod))
        return web.json_response(pod.object)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        key, _, name = request.query["fieldSelector"].partition("=")
        assert key == "metadata.name"
        seen = int(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while True:
                    async with self._news:
                        while self._version <= seen:
                            await self._news.wait()
                        news = [event for event in self._history if event[0] > seen]
                        seen = self._version
                    for _, kind, pod in news:
                        if pod["metadata"]["name"] == name:
                            await response.write(json.dumps({"type": kind, "object": pod}).encode() + b"\n")
        return response

    # --- exec ---

    async def _exec(self, request: web.Request, pod: Pod) -> web.StreamResponse:
        command = request.query.getall("command")
        await self._look_for_oom(pod)
        if pod.sandbox is None:
            raise ApiError(500, "container not found")
        socket = web.WebSocketResponse(protocols=PROTOCOLS)
        await socket.prepare(request)
        assert socket.ws_protocol in PROTOCOLS
        pod.execs.append(command)
        process = await asyncio.create_subprocess_exec(
            *self._entering(pod, command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            cwd="/",
        )
        pod.running += 1
        pod.sockets.add(socket)
        feeding = asyncio.create_task(_feed(socket, process))
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            draining = asyncio.gather(_drain(socket, 1, process.stdout), _drain(socket, 2, process.stderr))
            code = await process.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(draining, LATE_S)
            await self._look_for_oom(pod)
            with suppress(OSError):
                await socket.send_bytes(b"\x03" + json.dumps(_status(code)).encode())
                await socket.close()
        finally:
            pod.running -= 1
            pod.sockets.discard(socket)
            feeding.cancel()
        return socket

    def _entering(self, pod: Pod, command: list[str]) -> list[str]:
        """The command line that runs a command in the namespaces and limits of a pod."""
        assert pod.sandbox is not None
        group, identity = pod.sandbox._group, pod.sandbox._folder.identity
        user = [f"--reuid={identity.uid}", f"--regid={identity.gid}", "--clear-groups"] if identity else []
        network = ["--net"] if self.closed else []
        return [
            "sh", "-c", launch._ENTER, "sh", *(map(str, group.folders) if group else ()), "--",
            "setpriv", *user, "--no-new-privs", "--inh-caps=-all",
            "nsenter", f"--target={pod.pid}", "--preserve-credentials",
            "--user", "--mount", "--pid", "--ipc", "--uts", *network, "--", *command,
        ]  # fmt: skip

    async def close(self) -> None:
        for pod in list(self.pods.values()):
            await self._remove(pod)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._provider.close()


async def _main_of(process: BubblewrapProcess) -> int:
    """The process id, on the host, of the program that a sandbox's first process starts."""
    deadline = time.monotonic() + 60
    while process._first is not None and (first := _pid_of(process._first)) is not None:
        for child in _children(first):
            if (Path(f"/proc/{child}/comm").read_text()).startswith("python3"):
                return child
        assert time.monotonic() < deadline, "the main process of a pod does not start"
        await asyncio.sleep(0.005)
    raise AssertionError(f"the main process of a pod has ended: {process.stderr_tail()}")


async def _feed(socket: web.WebSocketResponse, process: asyncio.subprocess.Process) -> None:
    """From the stream to the command, whose input ends with the stream; the command itself goes on."""
    assert process.stdin is not None
    with suppress(OSError):
        async for message in socket:
            if message.type is not WSMsgType.BINARY or not message.data:
                continue
            if message.data[0] == 0:
                process.stdin.write(message.data[1:])
                await process.stdin.drain()
            elif message.data == b"\xff\x00":
                process.stdin.close()
    process.stdin.close()


async def _drain(socket: web.WebSocketResponse, channel: int, stream: asyncio.StreamReader) -> None:
    while data := await stream.read(16384):
        with suppress(OSError):
            await socket.send_bytes(bytes((channel,)) + data)


def _status(code: int) -> Json:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    number = code if code > 0 else 128 - code
    return {
        "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: exit status {number}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(number)}]},
    }  # fmt: skip


def limits_of(spec: Json) -> Limits:
    """What the pod may use, in the words of our own provider."""
    [container] = spec["containers"]
    amounts = container["resources"]["limits"]
    [tmp] = [volume for volume in spec["volumes"] if volume["name"] == "tmp"]
    return Limits(
        cpus=int(amounts["cpu"].removesuffix("m")) / 1000,
        memory_mb=int(amounts["memory"].removesuffix("Mi")),
        pids=512,
        tmp_mb=int(tmp["emptyDir"]["sizeLimit"].removesuffix("Mi")),
    )


def documents(path: Path) -> list[Json]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def rights_of(path: Path, role: str) -> set[tuple[str, str, str]]:
    """Verb, group and resource that a Role of a file allows."""
    [found] = [
        document
        for document in documents(path)
        if document["kind"] == "Role" and document["metadata"]["name"] == role
    ]
    return {
        (verb, group, resource)
        for rule in found["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@asynccontextmanager
async def open_api(folder: Path) -> AsyncIterator[KubeApi]:
    """The stand-in on a free port."""
    api = KubeApi(folder)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    [address] = runner.addresses
    api.url = f"http://127.0.0.1:{address[1]}"
    api.limits_memory = (await api._provider.host()).cgroups is not None
    try:
        yield api
    finally:
        await api.close()
        await runner.cleanup()
