"""What the engine is told of a sandbox's containers: everything locked that it can lock."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskyard.sandbox.carried import COMMAND
from taskyard.sandbox.provider import HOME, WORKSPACE, Limits
from taskyard.sandbox.rules import SHM_BYTES, TMP, UID, VAR_TMP

Json = dict[str, Any]

PLACE, SANDBOX = "taskyard.place", "taskyard.sandbox"
"""Labels: whose it is."""


@dataclass(frozen=True)
class Volumes:
    """The names of the two volumes of a sandbox."""

    workspace: str
    home: str

    @classmethod
    def of(cls, place: str, sandbox_id: str) -> Volumes:
        name = f"taskyard-{place[:12]}-{sandbox_id}"
        return cls(f"{name}-workspace", f"{name}-home")

    @property
    def names(self) -> tuple[str, str]:
        return self.workspace, self.home


def labels(place: str, sandbox_id: str) -> dict[str, str]:
    return {PLACE: place, SANDBOX: sandbox_id}


def volume(name: str, marks: Mapping[str, str]) -> Json:
    return {"Name": name, "Labels": dict(marks)}


def carrier(
    image: str,
    seccomp: str,
    marks: Mapping[str, str],
    volumes: Volumes,
    limits: Limits,
    *,
    cpus: int,
    runtime: str | None,
    mounts: Sequence[Json],
    declared: Sequence[str],
) -> Json:
    """A container for one command. It ends when the connection to its standard input does.

    seccomp: the system-call filter, as the engine takes it.
    cpus: of the engine's host. mounts: besides the volumes. declared: where the image wants volumes.
    """
    config = _locked(image, seccomp, marks, volumes, limits, cpus, runtime)
    config |= {
        "Entrypoint": list(COMMAND),
        "User": f"{UID}:{UID}",
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "OpenStdin": True,
        "StdinOnce": True,
    }
    host = config["HostConfig"]
    host["Mounts"] += mounts
    taken = [WORKSPACE, HOME, TMP, VAR_TMP, *(mount["Target"] for mount in mounts)]
    small = f"rw,nosuid,nodev,exec,mode=1777,size={limits.tmp_mb}m"
    # A volume that an image declares would be a folder without any limit.
    declared = [path for path in map(posixpath.normpath, declared) if path not in taken]
    host["Tmpfs"] = dict.fromkeys((TMP, VAR_TMP, *declared), small)
    return config


def giver(
    image: str, seccomp: str, marks: Mapping[str, str], volumes: Volumes, limits: Limits, cpus: int
) -> Json:
    """A container that gives the new, empty volumes to the sandbox's user.

    An engine makes volumes that belong to root, and has no option for that which all engines know. So the site's
    image does it, never that of an environment: as root, but with the one capability it takes, and before anything
    of an agent's is in there.
    """
    config = _locked(image, seccomp, marks, volumes, limits, cpus, None)
    script = 'chown "$0" "$@" && exec chmod 0700 "$@"'
    config |= {"Entrypoint": ["/bin/sh", "-c", script, f"{UID}:{UID}", WORKSPACE, HOME], "User": "0:0"}
    # Only the owner may change the mode: by then that is not root any more.
    config["HostConfig"]["CapAdd"] = ["CHOWN", "FOWNER"]
    return config


def _locked(
    image: str,
    seccomp: str,
    marks: Mapping[str, str],
    volumes: Volumes,
    limits: Limits,
    cpus: int,
    runtime: str | None,
) -> Json:
    host: Json = {
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges", f"seccomp={seccomp}"],
        "Privileged": False,
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "Memory": limits.memory_mb * 2**20,
        "MemorySwap": limits.memory_mb * 2**20,  # both together: none
        "PidsLimit": limits.pids,
        "NanoCpus": int(min(limits.cpus, cpus) * 1e9),  # more than there are is refused
        "ShmSize": SHM_BYTES,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        "LogConfig": {"Type": "none"},
        "RestartPolicy": {"Name": "no"},
        "Init": False,
        "Mounts": [
            {"Type": "volume", "Source": name, "Target": target, "VolumeOptions": {"NoCopy": True}}
            for name, target in zip(volumes.names, (WORKSPACE, HOME), strict=True)
        ],
    }
    if runtime is not None:
        host["Runtime"] = runtime
    return {
        "Image": image,
        "Cmd": [],
        "WorkingDir": "/",
        "Hostname": "sandbox",
        "Labels": dict(marks),
        "Tty": False,
        # An engine that stops is no reason for a command to finish: what is killed is done again.
        "StopSignal": "SIGKILL",
        "Healthcheck": {"Test": ["NONE"]},  # an image's own would be run beside the command
        "HostConfig": host,
    }
