"""Control groups: the real ones of this machine where it has them, and version 2 over a small stand-in."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from taskyard.sandbox import cgroups
from taskyard.sandbox.cgroups import CONTROLLERS, Cgroups, UnavailableError, find
from taskyard.sandbox.provider import Limits

LIMITS = Limits(cpus=0.5, memory_mb=256, pids=64, tmp_mb=16)


@pytest.fixture
def real() -> Cgroups:
    try:
        return find()
    except UnavailableError as error:
        pytest.skip(f"no control groups for us: {error}")


def first_value(group: cgroups.Group, controller: str, *names: str) -> str:
    return next(
        (group.paths[controller] / name).read_text()
        for name in names
        if (group.paths[controller] / name).exists()
    )


async def test_a_real_group(real: Cgroups) -> None:
    group = real.group(f"test-{os.getpid()}")
    group.create(LIMITS)
    assert first_value(group, "pids", "pids.max") == "64\n"
    assert first_value(group, "memory", "memory.max", "memory.limit_in_bytes") == f"{256 * 2**20}\n"
    assert first_value(group, "cpu", "cpu.max", "cpu.cfs_quota_us").split()[0] == "50000"
    assert group.oom_kills() == 0
    enter = 'for g; do echo 0 > "$g/cgroup.procs"; done; setsid sleep 600 & exec sleep 600'
    process = await asyncio.create_subprocess_exec("sh", "-c", enter, "sh", *map(str, group.folders))
    deadline = time.monotonic() + 60
    while len(first_value(group, "pids", "cgroup.procs").split()) < 2:
        assert time.monotonic() < deadline, "the processes do not enter the group"
        await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        await group.remove()
        assert await process.wait() == -9
    assert not any(folder.exists() for folder in group.folders)
    await group.remove()


class Kernel:
    """The part of control groups version 2 that matters here, as plain files.

    A write to cgroup.procs moves a process; controllers can be enabled only in a group without processes.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.group("", procs="")
        monkeypatch.setattr(cgroups, "_write", self.write)

    def group(
        self, name: str, procs: str = "", controllers: str = "cpuset cpu io memory pids", mode: int = 0o755
    ) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text(procs)
        (folder / "cgroup.controllers").write_text(controllers)
        (folder / "cgroup.subtree_control").write_text("")
        folder.chmod(mode)
        return folder

    def write(self, path: Path, value: object, *, optional: bool = False) -> bool:
        if path.name == "cgroup.procs":
            for procs in self.root.rglob("cgroup.procs"):
                procs.write_text(
                    "".join(f"{pid}\n" for pid in procs.read_text().split() if pid != str(value))
                )
            path.write_text(f"{path.read_text() if path.exists() else ''}{value}\n")
        elif path.name == "cgroup.subtree_control":
            if path.parent != self.root and (path.parent / "cgroup.procs").read_text():
                raise OSError(16, "Device or resource busy", str(path))
            path.write_text(str(value).replace("+", ""))
        else:
            path.write_text(str(value))
        return True

    def membership(self, line: str) -> Path:
        own = self.root / "own"
        own.write_text(line)
        return own


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path / "cgroup", monkeypatch)


def test_version_2_delegated(kernel: Kernel) -> None:
    unit = kernel.group("system.slice/taskyard.service", procs="10\n11\n")
    found = find(kernel.root, kernel.membership("0::/system.slice/taskyard.service\n"), euid=1000)
    assert found == Cgroups(2, dict.fromkeys(CONTROLLERS, unit))
    assert (unit / "cgroup.procs").read_text() == ""
    assert (unit / "taskyard-server" / "cgroup.procs").read_text() == "10\n11\n"
    assert set((unit / "cgroup.subtree_control").read_text().split()) == set(CONTROLLERS)
    group = found.group("run")
    group.create(LIMITS)
    assert group.folders == [unit / "run"]
    values = {path.name: path.read_text() for path in (unit / "run").iterdir()}
    assert values == {
        "pids.max": "64", "memory.max": str(256 * 2**20), "memory.swap.max": "0", "memory.oom.group": "1",
        "cpu.max": "50000 100000",
    }  # fmt: skip
    (unit / "run" / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert group.oom_kills() == 2


@pytest.mark.parametrize("name", ["taskyard-server", ".control"])
def test_version_2_a_process_beside_the_sandboxes(kernel: Kernel, name: str) -> None:
    unit = kernel.group("a.service")
    kernel.group(f"a.service/{name}", procs="10\n")
    found = find(kernel.root, kernel.membership(f"0::/a.service/{name}\n"), euid=1000)
    assert found.parents["pids"] == unit
    assert (unit / name / "cgroup.procs").read_text() == "10\n"
    assert not (unit / name / "taskyard-server").exists()
    found.group("run").create(LIMITS)
    assert found.names() == {"run"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_version_2_not_delegated(kernel: Kernel) -> None:
    kernel.group("session.scope", mode=0o555)
    with pytest.raises(UnavailableError, match="no control group is delegated"):
        find(kernel.root, kernel.membership("0::/session.scope\n"))


def test_version_2_controller_missing(kernel: Kernel) -> None:
    unit = kernel.group("a.service", procs="10\n", controllers="cpu pids")
    with pytest.raises(UnavailableError, match="controllers memory are not available"):
        find(kernel.root, kernel.membership("0::/a.service\n"), euid=1000)
    assert (unit / "cgroup.procs").read_text() == "10\n"


def test_version_2_root_without_delegation(kernel: Kernel) -> None:
    kernel.group("session.scope", procs="10\n")
    kernel.group("taskyard")
    found = find(kernel.root, kernel.membership("0::/session.scope\n"), euid=0)
    assert found.parents["memory"] == kernel.root / "taskyard"
    assert (kernel.root / "session.scope" / "cgroup.procs").read_text() == "10\n"


def test_version_1_needs_root_and_controllers(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="version 1, which only root can use"):
        find(tmp_path, euid=1000)
    (tmp_path / "pids").mkdir()
    (tmp_path / "pids" / "cgroup.procs").touch()
    with pytest.raises(UnavailableError, match="controllers memory, cpu are not mounted"):
        find(tmp_path, euid=0)


def test_a_file_that_may_only_be_written() -> None:
    # As cgroup.kill is to a user other than root, who may not read it.
    nobody = 65_534
    with TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders let no other user in
        kill = Path(folder, "cgroup.kill")
        kill.touch(mode=0o200)
        root = os.geteuid() == 0
        if root:
            os.chown(folder, nobody, -1)
            os.chown(kill, nobody, -1)
            os.seteuid(nobody)
        try:
            assert cgroups._write(kill, 1, optional=True)
            assert not cgroups._write(kill.with_name("cgroup.other"), 1, optional=True)
        finally:
            if root:
                os.seteuid(0)
        kill.chmod(0o600)
        assert kill.read_text() == "1"


def test_processes_that_cannot_be_seen_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text(f"0\n0\n{2**22 + 1}\n")
    assert cgroups._pids(tmp_path) == [2**22 + 1]
