"""What all sandboxes have in common inside, however they are made: user, places, environment, where mounts may be."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from taskyard.sandbox.programs import SEARCH_PATH
from taskyard.sandbox.provider import HOME, WORKSPACE, SandboxError

USER, UID = "agent", 1000
TMP, VAR_TMP, SHM = "/tmp", "/var/tmp", "/dev/shm"  # noqa: S108 - paths inside
SHM_BYTES = 64 * 1024 * 1024

_ENVIRONMENT = {
    "PATH": SEARCH_PATH, "HOME": HOME, "USER": USER, "LANG": "C.UTF-8", "TERM": "dumb", "TMPDIR": TMP,
}  # fmt: skip


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a command. Raises SandboxError for a variable that cannot be."""
    for name, value in given.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise SandboxError(f"the environment variable {name!r} has a name or value that cannot be")
    return {**_ENVIRONMENT, **given}


def check_target(target: str) -> None:
    """Refuse mounts over the sandbox's own places and below a folder that the agent writes. Raises SandboxError.

    Missing folders of a target are made. In a folder that an agent wrote before, those may be links to anywhere.
    """
    if not target.startswith("/") or posixpath.normpath(target) != target or target.startswith("//"):
        raise SandboxError(f"a mount needs an absolute, normal path inside, not {target!r}")
    for own in (WORKSPACE, HOME, "/proc", "/dev"):
        if target == own or target.startswith(f"{own}/"):
            raise SandboxError(
                f"nothing can be mounted at {target}: {own} is the sandbox's own; use another place"
            )
    if target == "/" or any(own.startswith(f"{target}/") for own in (WORKSPACE, HOME)):
        raise SandboxError(f"nothing can be mounted at {target}: it would hide the sandbox's own folders")
