"""`deploy/compose.yaml` read as Docker reads it, and its services started as processes on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.s3_keeper import free_ports

DEPLOY = Path(__file__).parents[2] / "deploy"
DEADLINE_S = 90.0
Service = dict[str, Any]


def services(values: Mapping[str, str]) -> dict[str, Service]:
    """The services, with these values for the variables of the file. Raises KeyError for one that has to be set."""
    read: dict[str, Service] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    filled: dict[str, Service] = _filled(read, values)
    return filled


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, values) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, values) for inner in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if match["name"] in values:
            return values[match["name"]]
        if match["how"] == ":-":
            return str(match["text"])
        raise KeyError(match["name"])

    return re.sub(r"\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<text>[^}]*))?\}", fill, value)


@dataclass
class Processes:
    """Processes instead of containers. What is reached by a service's name there, has a port of its own here."""

    folder: Path
    services: dict[str, Service]
    addresses: dict[str, str] = field(default_factory=dict)
    """`name:port` in the file -> `127.0.0.1:port`, or anything else that stands for it here."""
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)

    def local(self, text: str) -> str:
        for there, here in self.addresses.items():
            text = text.replace(there, here)
        return text

    def own(self, service: str, port: str) -> str:
        """A free port that stands for this one of a service."""
        [free] = free_ports(1)
        self.addresses[f"{service}:{port}"] = f"127.0.0.1:{free}"
        return str(free)

    def environment(self, service: str) -> dict[str, str]:
        return {name: self.local(text) for name, text in self.services[service]["environment"].items()}

    def start(self, name: str, command: list[str], **env: str) -> None:
        program = Path(sysconfig.get_path("scripts")) / command[0]
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                [str(program), *command[1:]],
                env={"PATH": os.environ["PATH"], "HOME": str(folder), **self.environment(name), **env},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.running[name] = process
        self.stack.callback(self.stop, name)

    def stop(self, name: str) -> None:
        process = self.running[name]
        if process.poll() is None:
            process.terminate()
        process.wait(DEADLINE_S)

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait(DEADLINE_S)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait(self, name: str, url: str, status: int = 200) -> None:
        """Until it answers."""
        end = time.monotonic() + DEADLINE_S
        while True:
            assert self.running[name].poll() is None, f"{name} ended: {self.said(name)[-3000:]}"
            try:
                if httpx.get(url, trust_env=False, timeout=5).status_code == status:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < end, f"{name} does not answer: {self.said(name)[-3000:]}"
            time.sleep(0.05)
