"""`deploy/kubernetes`: valid, fitting each other and the program; and no more allowed than is needed."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from taskyard.sandbox import pod_checks, pods
from taskyard.sandbox.provider import Limits
from taskyard.settings import Settings
from taskyard.settings.sandboxes import KubernetesSettings
from tests.deploy.test_compose import is_setting
from tests.support.kube_api import DEPLOY, documents

Json = dict[str, Any]
FILES = sorted(path for path in DEPLOY.glob("*.yaml") if path.name != "kustomization.yaml")
SECRETS = {
    "TASKYARD_DATABASE_URL": "postgresql://taskyard:x@db.example.org/taskyard",
    "TASKYARD_SECRET_KEYS": '["' + base64.b64encode(bytes(32)).decode() + '"]',
    "TASKYARD_OBJECTS__S3__ACCESS_KEY_ID": "key",
    "TASKYARD_OBJECTS__S3__SECRET_ACCESS_KEY": "secret",
}


def everything() -> list[Json]:
    return [document for path in FILES for document in documents(path)]


def the(kind: str, name: str) -> Json:
    [found] = [one for one in everything() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pods_of(document: Json) -> Json:
    spec: Json = document["spec"]["template"]["spec"]
    return spec


PARTS = [("Deployment", "taskyard-api"), ("StatefulSet", "taskyard-worker")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifests_are_valid(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_kustomization_names_all_of_them() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in FILES]
    assert [image["name"] for image in kustomization["images"]] == ["taskyard"]


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_variable_is_a_setting_with_a_good_value(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [container] = pods_of(the(kind, name))["containers"]
    values = the("ConfigMap", "taskyard")["data"] | SECRETS
    values |= {entry["name"]: entry.get("value", "taskyard-worker-0") for entry in container.get("env", [])}
    for key, text in values.items():
        assert is_setting(key), key
        monkeypatch.setenv(key, text)
    settings = Settings(_env_file=None)
    assert settings.sandbox.provider == "kubernetes"
    assert settings.sandbox.kubernetes.namespace == the("Namespace", "taskyard-sandboxes")["metadata"]["name"]
    assert name != "taskyard-worker" or settings.worker.name == "taskyard-worker-0"
    document = (DEPLOY.parents[1] / "docs" / "kubernetes.md").read_text()
    assert [key for key in SECRETS if key not in document] == []


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_parts_start_and_have_no_privileges(kind: str, name: str) -> None:
    spec = pods_of(the(kind, name))
    [container] = spec["containers"]
    help_of = [sys.executable, "-m", "taskyard.cli", *container["args"], "--help"]
    assert subprocess.run(help_of, capture_output=True, check=False).returncode == 0
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    # Only workers use the cluster.
    if name == "taskyard-api":
        assert spec["automountServiceAccountToken"] is False
    else:
        assert spec["serviceAccountName"] == the("ServiceAccount", "taskyard-worker")["metadata"]["name"]


def test_the_image_has_the_client_of_the_cluster() -> None:
    assert "uv sync --locked --no-dev --extra kubernetes" in (DEPLOY.parent / "Dockerfile").read_text()


def test_the_service_finds_the_api() -> None:
    template = the("Deployment", "taskyard-api")["spec"]["template"]
    assert the("Service", "taskyard")["spec"]["selector"] == template["metadata"]["labels"]


def test_sandboxes_are_closed_and_rights_are_theirs_only() -> None:
    policy = the("NetworkPolicy", "sandboxes-reach-nothing")
    assert pod_checks.closes(policy["spec"])
    role = the("Role", "taskyard-sandboxes")
    for document in (
        policy,
        role,
        the("ResourceQuota", "sandboxes"),
        the("RoleBinding", "taskyard-sandboxes"),
    ):
        assert document["metadata"]["namespace"] == "taskyard-sandboxes"
    allowed = {
        (verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }
    needed = {
        (verb, f"{resource}/{part}" if part else resource) for verb, resource, part in pod_checks.RIGHTS
    }
    assert allowed == needed | {("list", "networkpolicies")}
    assert not any(document["kind"].startswith("Cluster") for document in everything())


def test_pods_of_sandboxes_pass_the_standard_of_their_namespace() -> None:
    """`restricted` allows these kinds of volumes only."""
    namespace = the("Namespace", "taskyard-sandboxes")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    wanted = pods.Wanted("p", "s", "m", Limits(1, 512, 64, 64), "image", 60)
    manifest = pods.pod(wanted, KubernetesSettings())
    assert manifest["metadata"]["namespace"] == namespace["name"]
    assert all("emptyDir" in volume for volume in manifest["spec"]["volumes"])


@pytest.mark.parametrize("disk_mb", [None, 20_480])
def test_the_quota_takes_the_pods_of_sandboxes(disk_mb: int | None) -> None:
    """It refuses pods that say nothing of what it counts."""
    wanted = pods.Wanted("p", "s", "m", Limits(1, 512, 64, 64, disk_mb=disk_mb), "image", 60)
    [container] = pods.pod(wanted, KubernetesSettings())["spec"]["containers"]
    for counted in the("ResourceQuota", "sandboxes")["spec"]["hard"]:
        kind, _, what = counted.partition(".")
        assert counted == "pods" or what in container["resources"][kind], counted
