"""Real leftovers of each kind, made by a server that is killed; and what lives beside them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from taskyard.sandbox import cgroups, identities, strays
from taskyard.sandbox.folder import group_name
from taskyard.sandbox.provider import SandboxError, Spec
from taskyard.sandbox.strays import Stray
from taskyard.sandbox.sweep import Facts, Leftovers, leftovers, sweep
from tests.support.sandboxes import LIMITS, Hut, first_line, shell

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="uids and control groups of sandboxes need root")


async def nothing(_: Collection[str]) -> set[str]:
    return set()


class TestDecision:
    def test_nothing_there(self) -> None:
        assert leftovers(Facts(), set()) == Leftovers((), (), ())

    def test_a_sandbox_goes_unless_it_is_kept(self) -> None:
        assert leftovers(Facts(sandboxes=("a", "b")), {"b", "c"}).sandboxes == ("a",)

    def test_a_group_goes_with_its_folder(self) -> None:
        facts = Facts(groups=frozenset({"a.1", "b.2"}), folder_groups=frozenset({"b.2", "c.3"}))
        assert leftovers(facts, set()).groups == ("a.1",)

    def test_no_group_goes_when_nobody_can_know(self) -> None:
        assert leftovers(Facts(groups=frozenset({"a.1"})), set()).groups == ()

    def test_a_process_goes_with_its_folder(self) -> None:
        gone, there = Stray(1, "a", removed=True), Stray(2, "a", removed=False)
        assert leftovers(Facts(processes=(gone, there)), set()).processes == (gone,)


SERVER = """
import asyncio, sys
from pathlib import Path
from tests.support.sandboxes import Hut

async def main():
    hut = Hut(Path(sys.argv[1]))
    for name in sys.argv[2:]:
        sandbox = await hut.sandbox(name)
        (sandbox.scratch / "a.bundle").write_bytes(b"x")
        process = await sandbox.exec(["sh", "-c", "echo work > file; echo ready; exec sleep 600"])
        await process.stdout.readline()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def server(hut: Hut, *names: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with sandboxes in which something runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(hut.folder), *names, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def killed(hut: Hut, *names: str) -> None:
    """What a server leaves that is killed."""
    async with server(hut, *names):
        pass


def uids(hut: Hut) -> list[str]:
    return [path.name for path in identities.folders() if path.parent == hut.provider.root]


async def test_what_a_dead_server_left_is_removed(hut: Hut) -> None:
    await killed(hut, "one", "two")
    swept = await sweep(hut.provider, nothing)
    assert sorted(swept.sandboxes) == ["one", "two"]
    assert await hut.provider.list() == []
    if os.geteuid() == 0:
        assert uids(hut) == []
    assert (await sweep(hut.provider, nothing)).sandboxes == []


async def test_what_lives_is_not_touched(hut: Hut) -> None:
    mine = await hut.sandbox("mine")
    process = await mine.exec(["sh", "-c", "echo ready; read line; echo $line"], stdin=True)
    assert await first_line(process) == "ready"
    idle = await hut.sandbox("idle")
    async with server(hut, "theirs") as other:
        await killed(hut, "dead")
        swept = await sweep(hut.provider, nothing)
        assert swept.sandboxes == ["dead"]
        assert await hut.provider.list() == ["idle", "mine", "theirs"]
        assert other.returncode is None
        assert {stray.sandbox_id for stray in strays.find(hut.provider.root)} == {"mine", "theirs"}
    assert process.stdin is not None
    process.stdin.write(b"still here\n")
    assert await first_line(process) == "still here"
    await process.kill()
    assert (await shell(idle, "echo too")).output == "too\n"


async def test_what_is_kept_can_be_attached(hut: Hut) -> None:
    await killed(hut, "kept", "lost")

    async def kept(names: Collection[str]) -> set[str]:
        return {"kept"} & set(names)

    assert (await sweep(hut.provider, kept)).sandboxes == ["lost"]
    left = await hut.provider.attach("kept")
    assert left is not None
    hut.made.append(left)
    assert (await shell(left, "cat file")).output == "work\n"
    assert list(left.scratch.iterdir()) == []


async def test_one_that_gets_an_owner_meanwhile_stays(hut: Hut) -> None:
    await killed(hut, "one")
    answers = iter([set[str](), {"one"}])

    async def kept(_: Collection[str]) -> set[str]:
        return next(answers)

    assert (await sweep(hut.provider, kept)).sandboxes == []
    left = await hut.provider.attach("one")
    assert left is not None
    hut.made.append(left)


async def test_nothing_is_removed_when_the_owner_is_not_known(hut: Hut) -> None:
    await killed(hut, "one")

    async def away(_: Collection[str]) -> set[str]:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await sweep(hut.provider, away)
    assert await hut.provider.list() == ["one"]
    await sweep(hut.provider, nothing)


async def test_two_sweep_at_once(hut: Hut) -> None:
    names = [f"s{number}" for number in range(4)]
    await killed(hut, *names)
    other = Hut(hut.folder)
    first, second = await asyncio.gather(sweep(hut.provider, nothing), sweep(other.provider, nothing))
    assert sorted(first.sandboxes + second.sandboxes) == names
    assert await hut.provider.list() == []


async def test_sandboxes_are_made_while_others_sweep(hut: Hut) -> None:
    """Nobody gets between a new folder and its lock."""
    stop = asyncio.Event()

    async def sweep_on() -> None:
        other = Hut(hut.folder)
        while not stop.is_set():
            assert (await sweep(other.provider, nothing)).sandboxes == []

    sweeping = asyncio.create_task(sweep_on())
    for number in range(30):
        sandbox = await hut.provider.create(hut_spec(f"s{number}"))
        assert sandbox.scratch.is_dir()
        await sandbox.destroy()
    stop.set()
    await sweeping


def hut_spec(name: str) -> Spec:
    return Spec(name, LIMITS)


async def test_a_tree_that_does_not_want_to_go(hut: Hut) -> None:
    sandbox = await hut.sandbox("hostile")
    script = """
    mkdir -p a/b && ln -s / a/root && ln -s /etc/passwd passwd && mkfifo pipe && chmod 0 a/b
    d=.; for i in $(seq 300); do d=$d/very-long-name-of-a-folder; done; mkdir -p "$d" 2>/dev/null || (
      for i in $(seq 300); do mkdir -p very-long-name-of-a-folder && cd very-long-name-of-a-folder; done)
    touch -- -rf "new
line"; chmod 0 . a; chmod 0 "$HOME"
    """
    await shell(sandbox, script)
    await sandbox.detach()
    assert (await sweep(hut.provider, nothing)).sandboxes == ["hostile"]
    assert await hut.provider.list() == []
    assert Path("/etc/passwd").exists()


async def test_a_process_that_outlived_its_server(hut: Hut) -> None:
    """One that the end of its server did not reach; there is no other trace of it but what it sees."""
    folder = hut.provider.root / "stray" / "workspace"
    folder.mkdir(parents=True)
    line = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount", "sh", "-c"]
    bind = 'mount --bind "$1" /mnt && exec sleep 600'
    orphan = await asyncio.create_subprocess_exec(*line, bind, "sh", str(folder), start_new_session=True)
    try:
        await found(hut, 1)
        folder.rmdir()
        folder.parent.rmdir()
        assert [stray.removed for stray in strays.find(hut.provider.root)] == [True]
        assert (await sweep(hut.provider, nothing)).processes == [orphan.pid]
        assert await orphan.wait() == -signal.SIGKILL
    finally:
        if orphan.returncode is None:
            orphan.kill()
    await found(hut, 0)


async def found(hut: Hut, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(seen := strays.find(hut.provider.root)) != count:
        assert time.monotonic() < deadline, f"not {count} processes in sandboxes but {seen}"
        await asyncio.sleep(0.01)


async def test_what_still_runs_in_a_folder_ends_when_it_is_attached(hut: Hut) -> None:
    sandbox = await hut.sandbox("one")
    folder = hut.provider.root / "one" / "workspace"
    line = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount", "sh", "-c"]
    bind = 'mount --bind "$1" /mnt && exec sleep 600'
    orphan = await asyncio.create_subprocess_exec(*line, bind, "sh", str(folder), start_new_session=True)
    await found(hut, 1)
    await sandbox.detach()
    left = await hut.provider.attach("one")
    assert left is not None
    hut.made.append(left)
    assert await orphan.wait() == -signal.SIGKILL


@ROOT
async def test_a_group_and_a_uid_without_a_folder(hut: Hut) -> None:
    try:
        groups = cgroups.find()
    except cgroups.UnavailableError as error:
        pytest.skip(f"no control groups for us: {error}")
    sandbox = await hut.sandbox("lost")
    kept = await hut.sandbox("kept")
    name, kept_name = (group_name(hut.provider.root / one) for one in ("lost", "kept"))
    assert {name, kept_name} <= groups.names()
    # Somebody removed the folder by hand.
    await asyncio.to_thread(os.rename, hut.provider.root / "lost", hut.folder / "elsewhere")
    assert name in (await sweep(hut.provider, nothing)).groups
    assert name not in groups.names()
    assert kept_name in groups.names()
    assert uids(hut) == ["kept"]
    assert (await shell(kept, "echo fine")).output == "fine\n"
    await sandbox.destroy()


@ROOT
async def test_a_restart_of_the_host_takes_no_living_sandbox(hut: Hut, tmp_path: Path) -> None:
    """It empties the folder of claims; the sandbox is used again, and another server sweeps, and its own."""
    other = Hut(tmp_path / "other")
    left = await hut.sandbox("one")
    await left.detach()
    assert left._folder.identity is not None
    claim = identities.CLAIMS / str(left._folder.identity.uid)
    claim.unlink()
    sandbox = await hut.provider.attach("one")
    assert sandbox is not None
    hut.made.append(sandbox)
    process = await sandbox.exec(["cat"], stdin=True)
    await sweep(other.provider, nothing)
    claim.unlink()

    async def all_of_them(names: Collection[str]) -> set[str]:
        return set(names)

    await sweep(hut.provider, all_of_them)
    assert process.stdin is not None
    process.stdin.write(b"alive\n")
    assert await first_line(process) == "alive"
    await other.close()


async def test_a_dead_sandbox_makes_way_for_a_new_one(hut: Hut) -> None:
    await killed(hut, "one")
    sandbox = await hut.sandbox("one")
    assert (await shell(sandbox, "ls")).output == ""


async def test_one_that_was_not_finished_cannot_be_used(hut: Hut) -> None:
    """Its server was killed while it made the folder."""
    sandbox = await hut.sandbox("one")
    await sandbox.detach()
    (hut.provider.root / "one" / "home").rmdir()
    left = await hut.provider.attach("one")
    assert left is not None
    hut.made.append(left)
    with pytest.raises(SandboxError, match="damaged"):
        await shell(left, "true")
