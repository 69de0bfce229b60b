"""The provider for clusters: a sandbox is a pod without any network, and a command is an `exec` in it.

Everything goes through the API server: the streams of a command and the gateway's connections are carried over the
one web socket of its `exec`, so the pod needs no peer at all. The pod lives until it is destroyed, its main process
only keeps it; when the server dies, the carriers end with their streams, and at its deadline the cluster ends the pod.

A pod that was lost (evicted, out of memory, its node gone) cannot be used again: what counts is in the checkpoints.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import structlog

from taskyard.errors import SetupError
from taskyard.sandbox import carried, carrier, pod_state, pods
from taskyard.sandbox.base import Command
from taskyard.sandbox.carried import CarriedProcess, Wire
from taskyard.sandbox.cluster import Cluster, RefusedError
from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.hold import Facts, Hold
from taskyard.sandbox.pod_files import Copies, placed
from taskyard.sandbox.pod_wire import PodWire
from taskyard.sandbox.provider import (
    Kept,
    KilledError,
    Limits,
    LostError,
    Mount,
    Problem,
    Reason,
    SandboxError,
    Spec,
    Swept,
)
from taskyard.sandbox.remote import RemoteProvider, RemoteSandbox
from taskyard.settings import Settings
from taskyard.settings.sandboxes import Capability

log = structlog.get_logger()
Json = dict[str, Any]

SPARE_S = 3600
"""A pod ends by itself, so much after the longest run."""
GRACE_S = 1
GONE_S = 60.0
"""A pod that is to be removed has this long, before it is forced."""
FATE_S = 10.0
"""After the end of a stream, the cluster has this long to say what became of the pod."""
PUT_DOWN_S = 20.0
ACCOUNT_BYTES = 64 * 1024
DISK_LOOK_S = 30.0
ENDED_S = 600.0
"""A pod that has ended is kept for so long, for whoever wants to know why."""

_BOOT = ("python3", "-I", "-S", "-c", carrier.BOOT % (len(pods.INSIDE), len(pods.INSIDE)))
"""Runs pod_inside.py, which comes first on standard input."""


class EvictedError(LostError, KilledError):
    """The pod is gone, and not by what ran in it: another one may well live longer."""


class KubernetesProvider(RemoteProvider):
    """See provider.Provider."""

    name = "kubernetes"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.settings = settings.sandbox.kubernetes
        self.cluster = Cluster(self.settings)
        self.seconds = int(settings.runs.wall_clock_s) + SPARE_S
        self.disk = DiskWatch(None, rest_s=DISK_LOOK_S)

    async def capabilities(self) -> frozenset[Capability]:
        """See provider.Provider. Processes are limited by each node's kubelet, for all pods alike: not by us."""
        await self.cluster.connect()
        able: frozenset[Capability] = frozenset({"memory", "cpu", "disk", "image"})
        return able | {"kernel"} if self.settings.runtime_class is not None else able

    async def check(self) -> list[Problem]:
        """See provider.Provider."""
        from taskyard.sandbox.pod_checks import check

        return await check(self)

    async def close(self) -> None:
        await self.disk.close()
        await self.cluster.close()

    async def attach(self, sandbox_id: str) -> RemoteSandbox | None:
        """See provider.Provider. A sandbox whose pod was lost is removed, and there is none."""
        sandbox = await super().attach(sandbox_id)
        if isinstance(sandbox, KubernetesSandbox) and sandbox.pod is None:
            await sandbox.destroy()
            return None
        return sandbox

    def facts(self, spec: Spec) -> Facts:
        return {**super().facts(spec), "pod": pods.name_of(self.place, spec.id), "made": secrets.token_hex(8)}

    def sandbox(self, hold: Hold, mounts: Sequence[Mount] = ()) -> KubernetesSandbox:
        return KubernetesSandbox(self, hold, mounts)

    async def engine_has(self) -> set[str]:
        ours = pods.OURS | {pods.PLACE: pods.label(self.place)}
        return {pod_state.id_of(pod) for pod in await self.cluster.list(pods.selector(ours))}

    async def sweep(self, kept: Kept) -> Swept:
        """See provider.Provider. Also pods of others that have ended: their worker may never come back for them."""
        swept = await super().sweep(kept)
        try:
            for pod in await self.cluster.list(pods.selector(pods.OURS)):
                if (
                    pod_state.ended_s(pod) > ENDED_S
                    and pod["metadata"]["labels"].get(pods.PLACE) != self.place
                ):
                    await self.cluster.delete(pod["metadata"]["name"], pod["metadata"]["uid"], 0)
                    swept.sandboxes.append(pod_state.id_of(pod))
        except (SandboxError, SetupError) as error:
            log.warning("cannot look for pods that have ended", reason=error.detail)
        return swept

    async def remove_rest(self, sandbox_id: str) -> None:
        await self.remove_pod(pods.name_of(self.place, sandbox_id))

    async def remove_pod(self, name: str) -> None:
        """Remove a pod, if there is one; returns when nothing of it runs. Raises SandboxError."""
        pod = await self.cluster.get(name)
        if pod is None:
            return
        uid = pod["metadata"]["uid"]
        for grace_s in (GRACE_S, 0):
            # A pod that is forced is forgotten before it has ended; so first with the word of its node.
            await self.cluster.delete(name, uid, grace_s)
            gone, _ = await self.cluster.until(name, lambda seen: pod_state.is_gone(seen, uid), GONE_S)
            if gone:
                return
        raise SandboxError(f"the pod {name} cannot be removed: the cluster still has it")


class KubernetesSandbox(RemoteSandbox):
    """See provider.Sandbox. Made by KubernetesProvider."""

    def __init__(self, provider: KubernetesProvider, hold: Hold, mounts: Sequence[Mount]) -> None:
        super().__init__(hold, provider.disk, mounts)
        self._provider = provider
        self._cluster = provider.cluster
        self._name = pods.name_of(provider.place, self.id)
        self.pod: str | None = None
        """The uid of its pod; None: there is none that can be used."""
        self._lost: Reason | None = None
        """Why there is none any more."""
        self._going = False
        self._oom_kills = 0
        self._live: dict[str, PodWire | None] = {}
        """Commands by their tokens; those without a wire are about to start."""
        self._clearing: PodWire | None = None
        self._copies = Copies()

    async def make(self) -> None:
        assert self.hold.limits is not None
        provider, settings = self._provider, self._provider.settings
        made = str(self.hold.facts["made"])
        manifest = pods.pod(
            pods.Wanted(
                place=provider.place,
                sandbox_id=self.id,
                made=made,
                limits=self.hold.limits,
                image=self.hold.facts["image"] or settings.image,
                seconds=provider.seconds,
            ),
            settings,
        )
        await self._create(manifest, made)
        ready, pod = await self._cluster.until(self._name, pod_state.ready, settings.start_s)
        if not ready or pod is None:
            why = "it was removed" if pod is None else pod_state.why_not(pod)
            raise SandboxError(f"the pod {self._name} is not ready after {settings.start_s:g} seconds: {why}")
        self.pod = pod["metadata"]["uid"]

    async def _create(self, manifest: Json, made: str) -> None:
        """Make the pod, in place of one that a dead server left. Raises SandboxError."""
        try:
            await self._cluster.create(manifest)
        except RefusedError as error:
            if error.answer != 409:
                raise
            pod = await self._cluster.get(self._name)
            if pod is not None and pod["metadata"].get("annotations", {}).get(pods.MADE) == made:
                return  # by the attempt before, whose answer was lost
            await self._provider.remove_pod(self._name)
            await self._cluster.create(manifest)

    async def take_over(self) -> None:
        pod = await self._cluster.get(self._name)
        made = None if pod is None else pod["metadata"].get("annotations", {}).get(pods.MADE)
        if pod is None or made != self.hold.facts.get("made") or not pod_state.is_running(pod):
            self.hold.limits = None
            return
        account = await self._end_in_pod(None)
        self._oom_kills = account["oom_kills"]
        self.pod = pod["metadata"]["uid"]

    async def remove_all(self) -> None:
        await self._provider.remove_pod(self._name)
        self.pod = None

    async def destroy(self) -> None:
        # Nothing has to be ended one by one: all of it ends with the pod.
        self._going = True
        await super().destroy()

    # --- commands ---

    async def _start(self, command: Command, limits: Limits) -> CarriedProcess:
        """Mounts are copies, below /run/taskyard."""
        argv, mounts = placed(command.argv, command.mounts)
        with self._copies.used(mounts):
            await self._copies.bring(mounts, self._run_copy)
            return await super()._start(replace(command, argv=argv, mounts=mounts), limits)

    async def _run_copy(self, argv: Sequence[str]) -> CarriedProcess:
        assert self.hold.limits is not None
        return await super()._start(Command(argv, cwd="/", stdin=True), self.hold.limits)

    async def open_wire(self, mounts: Sequence[Mount], seconds: float | None) -> Wire:
        self._check_there()
        token = secrets.token_hex(16)
        if self._clearing is not None:
            with suppress(TimeoutError):  # it is given up by then
                await asyncio.wait_for(self._clearing.began.wait(), carried.START_S)
        alone = not self._live
        self._live[token] = None
        flags = json.dumps({"alone": alone, "remove": self._copies.stale()})
        held = ExitStack()
        held.callback(self._live.pop, token, None)
        held.enter_context(self._copies.used(mounts))
        try:
            socket = await self._cluster.exec(
                self._name, (*_BOOT, "run", flags, str(len(carried.SOURCE)), token)
            )
        except SandboxError:
            with held:
                await self._put_down(token)
            self._check_there()
            raise
        wire = PodWire(socket, lambda: self._put_down(token), held.close)
        self._live[token] = wire
        if alone:
            self._clearing = wire
        with suppress(OSError):  # its end says why
            await wire.write(pods.INSIDE)
        return wire

    def _check_there(self) -> None:
        """Raises LostError when there is no pod any more."""
        if self._lost is None:
            return
        why = {"oom": "it ran out of memory", "disk": "it filled its disk", "timeout": "its time was over"}
        reason = why.get(self._lost, "it was evicted or removed, or its node was lost")
        raise (EvictedError if self._lost == "killed" else LostError)(
            f"the pod of the sandbox {self.id} is gone: {reason}"
        )

    async def _put_down(self, token: str) -> Reason:
        """See pod_wire.PutDown."""
        if self._going:
            return "killed"
        if self._lost is not None:
            return self._lost
        try:
            account = await self._end_in_pod(token)
        except SandboxError as error:
            return await self._after_failure(error)
        oom, self._oom_kills = account["oom_kills"] > self._oom_kills, account["oom_kills"]
        return "oom" if oom else "killed"

    async def _after_failure(self, error: Exception) -> Reason:
        """What became of a pod in which nothing can be ended: it has ended, or is removed. Never raises."""
        uid = self.pod
        fate: Reason | None
        try:
            fate, _ = await self._cluster.until(self._name, lambda pod: pod_state.fate(pod, uid), FATE_S)
            if fate is None:
                log.warning(
                    "removing a pod in which a command cannot be ended", pod=self._name, why=str(error)
                )
                await self._provider.remove_pod(self._name)
                fate = "killed"
            self._lost = fate
        except SandboxError as away:
            # The carrier ends when its stream does; what is left after that is the sweep's, or the deadline's.
            log.warning("cannot end a command in a pod", pod=self._name, why=away.detail)
        return self._lost or "killed"

    async def _end_in_pod(self, token: str | None) -> dict[str, int]:
        """End a command, or everything; an account of it. Raises SandboxError."""
        words = () if token is None else (token,)
        output, errors = b"", b""
        try:
            async with asyncio.timeout(PUT_DOWN_S):
                socket = await self._cluster.exec(self._name, (*_BOOT, "end", *words))
                wire = PodWire(socket, _nothing, lambda: None)
                try:
                    await wire.write(pods.INSIDE)
                    while (found := await wire.read()) is not None:
                        stream, data = found
                        if stream == 1:
                            output += data
                        else:
                            errors += data
                        if len(output) + len(errors) > ACCOUNT_BYTES:
                            raise ValueError("it says too much")
                finally:
                    await wire.close()
            found = json.loads(output)
            account = {key: int(found[key]) for key in ("left", "oom_kills")}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # a timeout is an OSError
            said = (
                errors.decode("utf-8", "replace").strip() or str(error) or f"no answer for {PUT_DOWN_S:g} s"
            )
            raise SandboxError(f"nothing can be ended in the pod {self._name}: {said}") from error
        if account["left"]:
            raise SandboxError(f"{account['left']} processes of the pod {self._name} cannot be ended")
        return account


async def _nothing() -> Reason:
    return "killed"
