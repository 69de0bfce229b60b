"""In the guest, as root: runs through the unit as it is shipped. A line a check; the last is `passed` if all hold."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GROUP = Path("/sys/fs/cgroup/system.slice/taskyard.service")
SERVER = GROUP / "taskyard-server"
DATA = "/var/lib/taskyard/data"
WAIT_S = 300


def check(what: str, right: bool, seen: object = "") -> None:
    print(f"{time.monotonic():4.0f} s {'right' if right else f'WRONG ({seen})'}: {what}", flush=True)
    if not right:
        raise SystemExit(1)


def until(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (right := true()) and time.monotonic() < deadline:
        time.sleep(0.2)
    check(what, right, output("journalctl", "-u", "taskyard", "-n", "40") if not right else "")


def output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def begin(prompt: str) -> subprocess.Popen[str]:
    taskyard = ["env", f"TASKYARD_DATA_DIR={DATA}", "/opt/taskyard/bin/taskyard"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*taskyard, "run", prompt, "--agent", "scripted", "--follow"],
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ends(what: str, run: subprocess.Popen[str], status: int, word: str) -> None:
    told = run.communicate(timeout=WAIT_S)[0]
    check(what, (run.returncode, word in told) == (status, True), told)


def server() -> int:
    """The process of a server that is ready; 0 while there is none."""
    pid = int(output("systemctl", "show", "-P", "MainPID", "taskyard"))
    with suppress(OSError, ValueError):
        return pid if json.loads(Path(DATA, "server.json").read_text())["pid"] == pid else 0
    return 0


def in_sandboxes(name: str) -> str:
    """What this file of the groups of sandboxes says."""
    found = ""
    with suppress(OSError):
        for path in GROUP.iterdir():
            if path.is_dir() and path != SERVER:
                found += (path / name).read_text()
    return found


def sleeps() -> bool:
    pids = in_sandboxes("cgroup.procs").split()
    return any("sleep 300" in output("ps", "-o", "args=", "-p", pid) for pid in pids)


def begun() -> subprocess.Popen[str]:
    run = begin("SHELL sleep 300 & echo\nSLEEP 20\nSAY the last word")
    until("a run has begun", sleeps)
    return run


def stop() -> None:
    before = time.monotonic()
    subprocess.run(["systemctl", "stop", "taskyard"], check=True)
    check("the unit stops in time", time.monotonic() - before < 90)
    left = output("ps", "-o", "args=", "-u", "taskyard")
    check("no group and no process is left", not GROUP.exists() and not left, left)


subprocess.run(["systemctl", "start", "taskyard"], check=True)
until("the unit serves", lambda: server() > 0)
first = server()
check(
    "the server has a group beside the sandboxes", str(first) in (SERVER / "cgroup.procs").read_text().split()
)
ends(
    "memory is limited", begin("""SHELL python3 -c 'b"x" * 400_000_000'"""), 1, "TASKYARD_SANDBOX__MEMORY_MB"
)
bomb = begin('SHELL bash -c "b(){ b|b& }; b"\nSLEEP 3\nSAY the last word')
until(
    "a fork bomb comes to its limit",
    lambda: any(line[4:] > "0" for line in in_sandboxes("pids.events").splitlines()),
)
ends("its run ends", bomb, 0, "the last word")
until("ended runs leave no group", lambda: not in_sandboxes("cgroup.events"))
check("the server has lived on", server() == first)
interrupted = begun()
stop()
subprocess.run(["systemctl", "start", "taskyard"], check=True)
ends("the next start takes a run over", interrupted, 0, "the last word")
interrupted, first = begun(), server()
subprocess.run(["kill", "-9", str(first)], check=True)
until("a killed server is started again", lambda: server() not in (0, first))
ends("and takes its run over", interrupted, 0, "the last word")
stop()
print("passed")
