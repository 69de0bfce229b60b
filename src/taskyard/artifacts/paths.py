"""Storage paths of artifacts (tasks-api §4.9, §7): where each kind may lie, and under which name."""

from __future__ import annotations

import re
from uuid import UUID

MAX_NAME_BYTES = 500
"""Of a name inside a path: S3 takes 1024 bytes for the whole of it, clients send 500 characters."""
MAX_NAME_CHARS = 255
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff\\]")
"""Not in paths: S3 removes objects by a list in XML, which cannot say most of these. Some servers change the last."""


def safe_name(name: str) -> str:
    """The name without the folders before it."""
    last = name.rpartition("/")[2].strip()
    return "artifact" if last in ("", ".", "..") else last


def staged_prefix(folder: str, project_id: int, task_id: UUID) -> str:
    """What the paths of a task's staged artifacts begin with."""
    return f"{folder}/team_{project_id}/task_{task_id}/staged/"


def run_prefix(folder: str, project_id: int, task_id: UUID, run_id: UUID) -> str:
    """What the paths of a run's artifacts begin with."""
    return f"{folder}/team_{project_id}/task_{task_id}/run_{run_id}/"


def staged_path(prefix: str, artifact_id: str, name: str) -> str:
    return f"{prefix}{artifact_id}/{_short(name)}"


def run_path(prefix: str, artifact_id: str, name: str) -> str:
    return f"{prefix}{artifact_id[:8]}_{_short(name)}"


def is_staged_path(path: str, prefix: str, artifact_id: str) -> bool:
    """Whether the path can be that of this artifact among those of the prefix."""
    return path.startswith(f"{prefix}{artifact_id}/")


def is_run_path(path: str, prefix: str, artifact_id: str) -> bool:
    return path.startswith(f"{prefix}{artifact_id[:8]}_")


def _short(name: str) -> str:
    """The name, or the end of one that is too long: there is its kind."""
    return UNFIT.sub("_", name).encode()[-MAX_NAME_BYTES:].decode(errors="ignore")
