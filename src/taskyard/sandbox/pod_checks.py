"""What sandboxes need of a cluster, looked at one by one; for `taskyard doctor` and the server's start."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from taskyard.errors import TaskyardError
from taskyard.sandbox.cluster import Cluster, RefusedError
from taskyard.sandbox.image_checks import PROGRAMS, said
from taskyard.sandbox.pods import OURS
from taskyard.sandbox.provider import Limits, Problem, SandboxError, Spec

if TYPE_CHECKING:
    from taskyard.sandbox.kubernetes import KubernetesProvider

Json = dict[str, Any]

RIGHTS = (
    *((verb, "pods", "") for verb in ("create", "get", "list", "watch", "delete")),
    *((verb, "pods", "exec") for verb in ("create", "get")),
)
"""Verb, resource, subresource."""
_SMALL = Limits(cpus=1, memory_mb=256, pids=64, tmp_mb=16)
_APPLY = "Apply deploy/kubernetes (see docs/kubernetes.md)."

# $@ = programs.
_LACKS = 'for program; do command -v "$program" >/dev/null || echo "$program"; done'
# Arguments: host:port. Prints those that are reached. A refusal does not count: some plugins answer with that.
_REACH = """
import socket, sys
for target in sys.argv[1:]:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError:
        continue
    print(target)
"""
# The parent of this program is the carrier, which has none in a pod.
_PARENT = 'read -r line < "/proc/$PPID/stat"; set -- ${line##*)}; echo "$2"'
OUTSIDE = ("169.254.169.254:80", "1.1.1.1:443", "kubernetes.default.svc:443")
"""Besides the API server: what a pod must not reach."""


async def check(provider: KubernetesProvider) -> list[Problem]:
    """Everything that sandboxes need of the cluster. If nothing fatal is missing, a pod is made and tried."""
    try:
        version = await provider.cluster.version()
    except TaskyardError as error:
        remedy = "Name the cluster with TASKYARD_SANDBOX__KUBERNETES__KUBECONFIG and …__CONTEXT."
        return [Problem("Kubernetes", False, error.detail, remedy, fatal=True)]
    namespace = provider.settings.namespace
    problems = [
        Problem("Kubernetes", True, f"{version}, {provider.cluster.address}, namespace {namespace}"),
        await _rights(provider.cluster, namespace),
        await _policy(provider.cluster, namespace),
    ]
    if not any(problem.fatal and not problem.ok for problem in problems):
        problems += await _trial(provider)
    problems.append(
        Problem(
            "sandbox processes",
            False,
            "their number is limited by the kubelet of each node only, not for each sandbox",
            "Set podPidsLimit in the configuration of the kubelets.",
        )
    )
    return problems


async def _rights(cluster: Cluster, namespace: str) -> Problem:
    name = "Kubernetes rights"
    try:
        lacks = [
            f"{verb} {resource}{f'/{part}' if part else ''}"
            for verb, resource, part in RIGHTS
            if not await cluster.may(verb, resource, part)
        ]
    except SandboxError as error:
        return Problem(name, False, error.detail, _APPLY, fatal=True)
    if lacks:
        detail = f"not allowed in the namespace {namespace}, if there is one: {', '.join(lacks)}"
        return Problem(name, False, detail, _APPLY, fatal=True)
    return Problem(name, True, "pods can be made, removed, and used")


async def _policy(cluster: Cluster, namespace: str) -> Problem:
    name = "network policy"
    try:
        policies = await cluster.network_policies()
    except RefusedError as error:
        return Problem(name, False, f"cannot be looked at: {error.detail}", _APPLY)
    except SandboxError as error:
        return Problem(name, False, error.detail, _APPLY, fatal=True)
    ours = [policy for policy in policies if concerns(policy["spec"], OURS)]
    # They add up: what one of them allows is allowed.
    opening = [policy["metadata"]["name"] for policy in ours if opens(policy["spec"])]
    closing = [policy["metadata"]["name"] for policy in ours if closes(policy["spec"])]
    if opening:
        detail = f"{', '.join(opening)} of the namespace {namespace} allows sandboxes some traffic"
        return Problem(name, False, detail, "Remove it: sandboxes need no network at all.", fatal=True)
    if not closing:
        detail = f"none in the namespace {namespace} denies sandboxes all traffic"
        return Problem(name, False, detail, _APPLY, fatal=True)
    return Problem(name, True, f"{closing[0]} denies sandboxes all traffic")


def concerns(policy: Json, labels: Mapping[str, str]) -> bool:
    """Whether the spec of a policy may be about pods with these labels, and maybe others that are not known."""
    wanted = policy.get("podSelector", {}).get("matchLabels", {})
    return all(labels.get(key, wanted[key]) == wanted[key] for key in wanted)


def opens(policy: Json) -> bool:
    """Whether it allows any traffic."""
    return bool(policy.get("ingress") or policy.get("egress"))


def closes(policy: Json) -> bool:
    """Whether it is about all traffic of all our pods, and allows none."""
    selector = policy.get("podSelector", {})
    all_of_them = not selector.get("matchExpressions") and set(selector.get("matchLabels", {})) <= set(OURS)
    return all_of_them and {"Ingress", "Egress"} <= set(policy.get("policyTypes", [])) and not opens(policy)


async def _trial(provider: KubernetesProvider) -> list[Problem]:
    """A pod that starts, has what is needed, and reaches nothing."""
    settings = provider.settings
    try:
        sandbox = await provider.create(Spec(f"check-{secrets.token_hex(8)}", _SMALL))
        try:
            lacks = (await said(sandbox, "/bin/sh", "-c", _LACKS, "sh", *PROGRAMS)).split()
            parent = (await said(sandbox, "/bin/sh", "-c", _PARENT)).strip()
            targets = (_address(provider.cluster.address), *OUTSIDE)
            reached = (await said(sandbox, "python3", "-c", _REACH, *targets)).split()
        finally:
            await sandbox.destroy()
    except TaskyardError as error:
        remedy = f"Is the image {settings.image} there for the cluster? See docs/kubernetes.md."
        if settings.user_namespaces and "hostUsers" in error.detail:
            remedy = "Set TASKYARD_SANDBOX__KUBERNETES__USER_NAMESPACES=false if the cluster has none."
        return [Problem("sandbox start", False, error.detail, remedy, fatal=True)]
    return [
        Problem("sandbox start", True, "a command ran in a pod")
        if parent == "0"
        else Problem(
            "sandbox start",
            False,
            f"commands of a pod have a parent in it ({parent}): it cannot be told what they leave running",
            "Use another container runtime for sandboxes (TASKYARD_SANDBOX__KUBERNETES__RUNTIME_CLASS).",
            fatal=True,
        ),
        Problem(
            "sandbox image",
            not lacks,
            f"{settings.image}: {'not there: ' + ', '.join(lacks) if lacks else 'has what is needed'}",
            "Use an image with these programs; see docs/kubernetes.md.",
            fatal=True,
        ),
        Problem(
            "sandbox network",
            not reached,
            f"a pod reaches {', '.join(reached)}" if reached else "a pod reaches nothing",
            "The cluster does not enforce network policies: it needs a network plugin that does.",
            fatal=True,
        ),
    ]


def _address(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    return f"{f'[{host}]' if ':' in host else host}:{parts.port or (80 if parts.scheme == 'http' else 443)}"
