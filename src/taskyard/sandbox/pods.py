"""What a sandbox is in Kubernetes: the manifest of its pod, its name and labels. Plain data, and no cluster."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskyard.sandbox import pod_inside
from taskyard.sandbox.provider import HOME, WORKSPACE, Limits
from taskyard.sandbox.rules import SHM, SHM_BYTES, TMP, UID
from taskyard.settings.sandboxes import KubernetesSettings

Json = dict[str, Any]

CONTAINER = "sandbox"
MANAGED_BY = "app.kubernetes.io/managed-by"
COMPONENT = "app.kubernetes.io/component"
PLACE = "taskyard/place"
SANDBOX = "taskyard/sandbox"
ID = "taskyard/sandbox-id"
"""An annotation: the id as it is, which a label cannot always be."""
MADE = "taskyard/made"
"""An annotation: a random word of whoever made the pod, to know it again."""
OURS = {MANAGED_BY: "taskyard", COMPONENT: "sandbox"}
"""Labels of all sandboxes; the network policy of `deploy/kubernetes` goes by them."""
INSIDE = Path(pod_inside.__file__).read_bytes()

ROOM = 1.25
ROOM_MB = 1024
"""What the kubelet lets a sandbox have beyond its limit. It evicts, and then all is lost; so the provider's own watch,
which only ends what runs, is to be the first."""
ASKED_DISK_MB = 2048
"""What a node has to have free; few sandboxes come near their limit, and all of it would leave nodes empty."""


@dataclass(frozen=True)
class Wanted:
    """A pod to be made. seconds: after them the cluster ends it."""

    place: str
    sandbox_id: str
    made: str
    limits: Limits
    image: str
    seconds: int


def name_of(place: str, sandbox_id: str) -> str:
    """The name of a sandbox's pod: the id as far as it can be seen in it, and unique by a hash."""
    seen = re.sub(r"[^a-z0-9]+", "-", sandbox_id.lower()).strip("-")[:36].rstrip("-")
    digest = hashlib.sha256(f"{place}/{sandbox_id}".encode()).hexdigest()[:12]
    return f"taskyard-{seen}-{digest}"


def label(value: str) -> str:
    """The value itself if it can be that of a label, else a hash of it."""
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value):
        return value
    return "sha256-" + hashlib.sha256(value.encode()).hexdigest()[:48]


def selector(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def pod(wanted: Wanted, settings: KubernetesSettings) -> Json:
    """The manifest of a sandbox's pod: no network name service, no token, no privileges, everything with a limit."""
    spec: Json = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": wanted.seconds,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostname": "sandbox",
        # A name service is a way out that many network policies leave open.
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["127.0.0.1"]},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(wanted)],
        "volumes": _volumes(wanted.limits),
    }
    if settings.user_namespaces:
        spec["hostUsers"] = False
    if settings.runtime_class is not None:
        spec["runtimeClassName"] = settings.runtime_class
    if settings.image_pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": settings.image_pull_secret}]
    if settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name_of(wanted.place, wanted.sandbox_id),
            "namespace": settings.namespace,
            "labels": {**OURS, PLACE: label(wanted.place), SANDBOX: label(wanted.sandbox_id)},
            "annotations": {ID: wanted.sandbox_id, MADE: wanted.made},
        },
        "spec": spec,
    }


def _container(wanted: Wanted) -> Json:
    limits = wanted.limits
    most = {"cpu": f"{max(round(limits.cpus * 1000), 1)}m", "memory": f"{limits.memory_mb}Mi"}
    disk_mb = _disk_mb(limits)
    # Also without a limit: a quota on it refuses pods that ask for nothing.
    asked = most | {"ephemeral-storage": f"{min(2 * (disk_mb or ASKED_DISK_MB), ASKED_DISK_MB)}Mi"}
    if disk_mb is not None:
        most["ephemeral-storage"] = f"{2 * disk_mb}Mi"
    return {
        "name": CONTAINER,
        "image": wanted.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-I", "-S", "-c", INSIDE.decode(), "keep", str(wanted.seconds)],
        "workingDir": "/",
        "resources": {"limits": most, "requests": asked},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": TMP},
            {"name": "workspace", "mountPath": WORKSPACE},
            {"name": "home", "mountPath": HOME},
            {"name": "place", "mountPath": pod_inside.PLACE},
            {"name": "shm", "mountPath": SHM},
        ],
    }


def _volumes(limits: Limits) -> list[Json]:
    disk_mb = _disk_mb(limits)
    on_disk: Json = {} if disk_mb is None else {"sizeLimit": f"{disk_mb}Mi"}
    return [
        {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": f"{limits.tmp_mb}Mi"}},
        *({"name": name, "emptyDir": dict(on_disk)} for name in ("workspace", "home", "place")),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_BYTES // 2**20}Mi"}},
    ]


def _disk_mb(limits: Limits) -> int | None:
    """What the kubelet is told of the limit for each of the folders."""
    return None if limits.disk_mb is None else int(limits.disk_mb * ROOM) + ROOM_MB
