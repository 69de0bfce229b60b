"""The API of a Kubernetes cluster, as far as sandboxes need it: pods of one namespace, and commands in them.

Every call has a deadline, and is repeated a few times where that may help. What goes wrong becomes a SandboxError
that says what to do. The client library is loaded when it is first needed: most servers never do.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import yaml

from taskyard.errors import SetupError
from taskyard.sandbox.pods import CONTAINER
from taskyard.sandbox.provider import AwayError, SandboxError
from taskyard.settings.sandboxes import KubernetesSettings

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse

Json = dict[str, Any]
T = TypeVar("T")

CALL_S = 20.0
TRIES = 4
PAUSE_S = 0.25
"""Before the first repetition; doubled for each further one."""
WATCH_S = 30
"""So long a watch goes on before the pod is looked at anew, in case the watch is dead."""
HEARTBEAT_S = 30.0
TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
PROTOCOLS = "v5.channel.k8s.io, v4.channel.k8s.io"

_PASSING = frozenset({429, 500, 502, 503, 504})
_REMEDIES = {
    401: "the credentials of the worker are not accepted",
    403: "see deploy/kubernetes/rbac.yaml for what the worker's service account has to be allowed",
}


class RefusedError(AwayError):
    """The API server answered with an error. answer: its HTTP status."""

    def __init__(self, detail: str, answer: int) -> None:
        super().__init__(detail)
        self.answer = answer


class Cluster:
    """Connects when it is first used."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        self._lock = asyncio.Lock()
        self._api: Any = None
        self._streams: Any = None
        """The same for commands: an API client of its own that makes web sockets."""
        self.address = ""
        """URL of the API server."""

    async def connect(self) -> None:
        """Read the configuration, not yet ask the server. Raises SetupError."""
        async with self._lock:
            if self._api is not None:
                return
            try:
                from kubernetes_asyncio import client, config
                from kubernetes_asyncio.stream import WsApiClient
            except ImportError as error:
                raise SetupError(
                    "the sandbox provider 'kubernetes' needs a package that is not installed: run"
                    " `pip install taskyard[kubernetes]`"
                ) from error
            settings = self._settings
            found = client.Configuration()
            try:
                if settings.kubeconfig is None and _in_cluster():
                    config.load_incluster_config(client_configuration=found)  # type: ignore[no-untyped-call]
                else:
                    file = None if settings.kubeconfig is None else str(settings.kubeconfig)
                    await config.load_kube_config(
                        config_file=file,
                        context=settings.context,
                        client_configuration=found,
                        persist_config=False,
                    )
            except (
                config.ConfigException,
                yaml.YAMLError,
                OSError,
                ValueError,
                TypeError,
                KeyError,
            ) as error:
                where = settings.kubeconfig or "~/.kube/config"
                # What is no YAML may be quoted, and a token with it.
                said = "the file is no YAML" if isinstance(error, yaml.YAMLError) else error
                raise SetupError(
                    f"the cluster cannot be found: {said} (outside of a cluster {where} names it; see"
                    " TASKYARD_SANDBOX__KUBERNETES__KUBECONFIG and …__CONTEXT)"
                ) from error
            found.connection_pool_maxsize = 0  # each command is a connection for as long as it runs
            self.address = str(found.host)
            self._streams = WsApiClient(found, heartbeat=HEARTBEAT_S)
            self._streams.set_default_header("sec-websocket-protocol", PROTOCOLS)
            self._api = client.ApiClient(found)

    async def close(self) -> None:
        for api in (self._api, self._streams):
            if api is not None:
                await api.close()
        self._api = self._streams = None

    async def version(self) -> str:
        """Of the server. Raises SandboxError."""
        return str((await self._call("GET", "/version")).get("gitVersion", "unknown"))

    async def may(self, verb: str, resource: str, subresource: str = "", group: str = "") -> bool:
        """Whether we may do that in our namespace. Raises SandboxError."""
        attributes = {"namespace": self._settings.namespace, "verb": verb, "resource": resource}
        attributes |= {"subresource": subresource, "group": group}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = await self._call("POST", path, body=body)
        return bool(answer.get("status", {}).get("allowed"))

    async def network_policies(self) -> list[Json]:
        """Of our namespace. Raises SandboxError."""
        path = f"/apis/networking.k8s.io/v1/namespaces/{self._settings.namespace}/networkpolicies"
        return list((await self._call("GET", path))["items"])

    # --- pods ---

    async def create(self, manifest: Json) -> Json:
        """Make a pod. Raises RefusedError (409: there is one of this name), SandboxError."""
        return await self._call("POST", self._pods, body=manifest)

    async def get(self, name: str) -> Json | None:
        """A pod, or None if there is none of this name. Raises SandboxError."""
        try:
            return await self._call("GET", f"{self._pods}/{name}")
        except RefusedError as error:
            if error.answer != 404:
                raise
            return None

    async def list(self, selector: str) -> list[Json]:
        """Pods by their labels. Raises SandboxError."""
        return list((await self._call("GET", self._pods, {"labelSelector": selector}))["items"])

    async def delete(self, name: str, uid: str, grace_s: int) -> None:
        """Have a pod removed, if it is there and the one of this uid. Raises SandboxError."""
        body = {"gracePeriodSeconds": grace_s, "preconditions": {"uid": uid}}
        try:
            await self._call("DELETE", f"{self._pods}/{name}", body=body)
        except RefusedError as error:
            if error.answer not in (404, 409):
                raise

    async def until(
        self, name: str, good: Callable[[Json | None], T | None], seconds: float
    ) -> tuple[T | None, Json | None]:
        """Look at a pod until `good` finds something in it, with what it finds; None when the time is over.

        The second is the pod as it was last seen; None: there is none. Raises SandboxError when the server refuses, or
        is still away when the time is over, and what `good` raises.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            begun = loop.time()
            try:
                pod = await self.get(name)
            except RefusedError:
                raise
            except SandboxError:  # it may be restarting
                if loop.time() >= end:
                    raise
                await asyncio.sleep(PAUSE_S)
                continue
            found = good(pod)
            if found is not None or pod is None or loop.time() >= end:
                return found, pod
            try:
                async with (
                    asyncio.timeout_at(min(end, begun + WATCH_S + CALL_S)),
                    aclosing(self._watch(pod, end - begun)) as states,
                ):
                    async for pod in states:
                        if (found := good(pod)) is not None or pod is None:
                            return found, pod
            except (TimeoutError, SandboxError):
                pass  # also 410: the history is gone that we wanted to go on in
            # A server that ends each watch at once is not asked without a pause.
            await asyncio.sleep(max(min(PAUSE_S - (loop.time() - begun), end - loop.time()), 0))

    async def _watch(self, pod: Json, seconds: float) -> AsyncGenerator[Json | None]:
        """The states of a pod after this one; None when it is removed. Raises SandboxError."""
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={pod['metadata']['name']}",
            "resourceVersion": pod["metadata"]["resourceVersion"],
            "timeoutSeconds": str(max(min(int(seconds), WATCH_S), 1)),
        }
        response = await self._answer("GET", self._pods, query, None)
        try:
            while line := await response.content.readline():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _refused(event["object"], "watching a pod", int(event["object"].get("code", 500)))
                yield None if event["type"] == "DELETED" else event["object"]
        except (OSError, ValueError, KeyError, TypeError, _client_error()) as error:
            raise SandboxError(f"the Kubernetes API server broke a watch off: {error}") from error
        finally:
            response.close()

    async def exec(self, name: str, command: Sequence[str]) -> ClientWebSocketResponse:
        """Start a command in a pod, with three streams; gives the web socket, which is the caller's to close.

        More than one may be started when the connection breaks, of which the web socket is of one and the others have
        an input that has ended. Raises RefusedError, SandboxError.
        """
        await self.connect()
        import aiohttp

        query = [("command", word) for word in command]
        query += [("container", CONTAINER), ("stdin", "true"), ("stdout", "true"), ("stderr", "true")]

        async def once() -> ClientWebSocketResponse:
            try:
                async with asyncio.timeout(CALL_S):
                    opening = await self._streams.call_api(
                        f"{self._pods}/{name}/exec",
                        "GET",
                        query_params=query,
                        header_params={"Accept": "*/*"},
                        auth_settings=["BearerToken"],
                        _preload_content=False,
                        _return_http_data_only=True,
                    )
                    return cast("ClientWebSocketResponse", await opening)
            except aiohttp.WSServerHandshakeError as error:
                raise _refused({"message": error.message}, "a command in a pod", error.status) from error

        return await self._patiently(once)

    # --- the way there ---

    @property
    def _pods(self) -> str:
        return f"/api/v1/namespaces/{self._settings.namespace}/pods"

    async def _call(
        self, method: str, path: str, query: Mapping[str, str] = {}, *, body: Json | None = None
    ) -> Json:
        """One call, repeated a few times where the server is away or busy. Raises RefusedError, SandboxError."""

        async def once() -> Json:
            async with asyncio.timeout(CALL_S):
                response = await self._answer(method, path, query, body)
                try:
                    answer = json.loads(await response.read())
                except ValueError as error:
                    raise SandboxError("the Kubernetes API server answered with something else") from error
                return answer if isinstance(answer, dict) else {}

        return await self._patiently(once)

    async def _patiently(self, once: Callable[[], Awaitable[T]]) -> T:
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                return await once()
            except RefusedError as error:
                if error.answer not in _PASSING or attempt + 1 == TRIES:
                    raise
            except (OSError, _client_error()) as error:  # a timeout is an OSError
                if attempt + 1 == TRIES:
                    raise self._away(error) from error
        raise AssertionError

    async def _answer(self, method: str, path: str, query: Mapping[str, str], body: Json | None) -> Any:
        """The response, of which only the head was read. Raises RefusedError, OSError, aiohttp.ClientError."""
        await self.connect()
        response = await self._api.call_api(
            path,
            method,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(CALL_S, WATCH_S + CALL_S),
        )
        if 200 <= response.status < 300:
            return response
        try:
            raise _refused(await response.read(), f"{method} {path}", response.status)
        finally:
            response.close()

    def _away(self, error: BaseException) -> AwayError:
        said = str(error) or f"no answer for {CALL_S:g} seconds"
        return AwayError(f"the Kubernetes API server at {self.address} cannot be reached: {said}")


def _in_cluster() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ and TOKEN.exists()


def _client_error() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError


def _refused(answer: bytes | Json, what: str, code: int) -> RefusedError:
    """answer: a Status object, maybe as it came."""
    if isinstance(answer, bytes):
        try:
            status = json.loads(answer)
        except ValueError:
            status = None
        answer = status if isinstance(status, dict) else {}
    said = str(answer.get("message") or "no reason given")[:1000]
    remedy = f" ({_REMEDIES[code]})" if code in _REMEDIES and "quota" not in said else ""
    return RefusedError(f"the Kubernetes API server refused {what} with {code}: {said}{remedy}", code)
