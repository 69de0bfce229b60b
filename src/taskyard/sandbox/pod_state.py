"""What the cluster says of a pod: is it ready, is it gone, and what ended it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from taskyard.sandbox import pods
from taskyard.sandbox.provider import Reason, SandboxError

Json = dict[str, Any]

_HOPELESS = frozenset({
    "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError",
    "CreateContainerError", "RunContainerError",
})  # fmt: skip


def id_of(pod: Json) -> str:
    """The id of the sandbox that a pod is."""
    found = pod["metadata"].get("annotations", {}).get(pods.ID)
    return str(found or pod["metadata"]["labels"][pods.SANDBOX])


def ended_s(pod: Json) -> float:
    """Seconds since its end, or less where nobody says when that was; negative while it lives."""
    status = pod.get("status", {})
    if status.get("phase") not in ("Failed", "Succeeded"):
        return -1.0
    containers = status.get("containerStatuses", [])
    ends = [entry.get("state", {}).get("terminated", {}).get("finishedAt") for entry in containers]
    if known := [end for end in ends if end]:
        end = datetime.fromisoformat(max(known))
    else:
        end = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
        end += timedelta(seconds=pod["spec"].get("activeDeadlineSeconds", 0))
    return (datetime.now(UTC) - end).total_seconds()


def is_gone(pod: Json | None, uid: str) -> bool | None:
    """True, or None while the pod of this uid is there; for Cluster.until."""
    return True if pod is None or pod["metadata"]["uid"] != uid else None


def is_running(pod: Json) -> bool:
    """Whether commands can be started in it, and it is not about to go."""
    return pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]


def ready(pod: Json | None) -> bool | None:
    """True when commands can be started. Raises SandboxError when that will not happen."""
    if pod is None:
        return None
    status = pod.get("status", {})
    if status.get("phase") in ("Failed", "Succeeded") or "deletionTimestamp" in pod["metadata"]:
        raise SandboxError(f"the pod {pod['metadata']['name']} does not start: {why_not(pod)}")
    for container in status.get("containerStatuses", []):
        if container.get("state", {}).get("waiting", {}).get("reason") in _HOPELESS:
            raise SandboxError(f"the pod {pod['metadata']['name']} does not start: {why_not(pod)}")
    conditions = {entry["type"]: entry["status"] for entry in status.get("conditions", [])}
    return True if status.get("phase") == "Running" and conditions.get("Ready") == "True" else None


def why_not(pod: Json) -> str:
    """Why a pod is not ready, as far as the cluster says."""
    status = pod.get("status", {})
    said = [status.get("reason"), status.get("message")]
    for container in status.get("containerStatuses", []):
        for state in container.get("state", {}).values():
            said += [state.get("reason"), state.get("message")]
    for condition in status.get("conditions", []):
        if condition["status"] != "True":
            said += [condition.get("reason"), condition.get("message")]
    return ", ".join(dict.fromkeys(str(word) for word in said if word)) or f"it is {status.get('phase')}"


def fate(pod: Json | None, uid: str | None) -> Reason | None:
    """What ended a pod; None while it lives."""
    if pod is None or pod["metadata"]["uid"] != uid:
        return "killed"
    status = pod.get("status", {})
    if status.get("phase") not in ("Failed", "Succeeded"):
        return None
    for container in status.get("containerStatuses", []):
        if container.get("state", {}).get("terminated", {}).get("reason") == "OOMKilled":
            return "oom"
    if status.get("reason") == "DeadlineExceeded":
        return "timeout"
    message = str(status.get("message", "")).lower()
    if status.get("reason") == "Evicted" and ("ephemeral" in message or "emptydir" in message):
        return "disk"
    return "killed"
