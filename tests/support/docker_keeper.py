"""Hold the tests' container engine for one test process: `python docker_keeper.py LOCK FOLDER`.

Prints `ready`, or `no: REASON`, then waits for the end of its standard input. The system closes that pipe however the
test process ends. The keeper that leaves last ends the engine, and what runs in it, and removes the folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support import docker_image

IMAGE = "taskyard-test:1"
START_S = 60.0

_started: dict[Path, subprocess.Popen[bytes]] = {}
"""Engines of this process, by folder."""


@contextmanager
def locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """One keeper at a time starts, or ends, the engine."""
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield


class CannotError(Exception):
    pass


def client(folder: Path) -> httpx.Client:
    """To the engine's API."""
    transport = httpx.HTTPTransport(uds=str(folder / "docker.sock"))
    return httpx.Client(transport=transport, base_url="http://docker", timeout=START_S)


def running(folder: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(folder / "docker.sock"))
        except OSError:
            return False
    with client(folder) as http:
        return http.get("/_ping").status_code == 200


def start(folder: Path) -> None:
    """An engine that touches nothing of this host's network. Raises CannotError."""
    if os.geteuid() != 0:
        raise CannotError("a container engine needs root here")
    dockerd = shutil.which("dockerd")
    if dockerd is None:
        raise CannotError("dockerd is not installed (Debian: docker.io)")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [dockerd, "-H", f"unix://{folder}/docker.sock", "--data-root", f"{folder}/root"]
    command += ["--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"]
    command += ["--bridge=none", "--iptables=false", "--ip6tables=false"]
    with (folder / "log").open("ab") as log:
        process = _started[folder] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    end = time.monotonic() + START_S
    while not running(folder):
        if process.poll() is not None or time.monotonic() > end:
            _started.pop(folder).kill()
            process.wait()
            said = (folder / "log").read_text(errors="replace").strip().splitlines()
            raise CannotError(f"dockerd does not start: {said[-1] if said else process.returncode}")
        time.sleep(0.05)


def bring_image(folder: Path) -> None:
    with client(folder) as http:
        if http.get(f"/images/{IMAGE}/json").status_code == 200:
            return
        name, _, tag = IMAGE.partition(":")
        answer = http.post(
            "/images/create",
            params={"fromSrc": "-", "repo": name, "tag": tag},
            content=docker_image.pack(),
            headers={"Content-Type": "application/x-tar"},
        )
        if answer.status_code != 200 or "error" in answer.text:
            raise CannotError(f"the image cannot be imported: {answer.text[-300:]}")


def stop(folder: Path) -> None:
    """End all containers, then the engine, and remove all that it had."""
    if running(folder):
        with client(folder) as http:
            for container in http.get("/containers/json", params={"all": "true"}).json():
                http.delete(f"/containers/{container['Id']}", params={"force": "true", "v": "true"})
        end_engine(folder)
    # An engine that was started again does not undo the mount that the one before it made.
    while (folder / "root").is_mount():
        subprocess.run(["umount", str(folder / "root")], check=True)
    shutil.rmtree(folder, ignore_errors=True)


def end_engine(folder: Path, number: int = signal.SIGTERM) -> None:
    """End the engine's process, which may be another process's child, and wait for that."""
    pid = int((folder / "pid").read_text())
    os.kill(pid, number)
    if folder in _started:
        _started.pop(folder).wait(START_S)
    end = time.monotonic() + START_S
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > end:
            raise CannotError(f"dockerd ({pid}) does not end")
        time.sleep(0.05)


def main(lock: Path, folder: Path) -> None:
    users = folder.with_name(f"{folder.name}.users")
    with users.open("a") as file:
        try:
            with locked(lock):
                if not running(folder):
                    start(folder)
                bring_image(folder)
                fcntl.flock(file, fcntl.LOCK_SH)
        except CannotError as error:
            print(f"no: {error}", flush=True)
            return
        print("ready", flush=True)
        sys.stdin.read()
        with locked(lock):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # others still use it
            stop(folder)
            users.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
