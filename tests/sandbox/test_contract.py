"""What every sandbox provider does for its user: commands, streams, folders, limits, and nothing left behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from taskyard.sandbox.provider import Limits, Sandbox, SandboxError, Spec
from tests.support.sandboxes import (
    KINDS,
    LIMITS,
    AnyHut,
    first_line,
    gone,
    open_hut,
    processes_with,
    run,
    shell,
)
from tests.support.served import FETCH, Served

_naps = itertools.count(10)


@pytest.fixture
def nap() -> str:
    """Seconds that nobody else on this machine sleeps."""
    return f"9{os.getpid():07d}{next(_naps)}"


@pytest.fixture(params=KINDS)
async def hut(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyHut]:
    async with open_hut(request.param, tmp_path / "data", request) as hut:
        yield hut


@pytest.fixture
async def sandbox(hut: AnyHut) -> Sandbox:
    return await hut.sandbox()


async def test_environment_is_the_default_and_what_is_given(sandbox: Sandbox) -> None:
    done = await run(sandbox, "env", "-0", env={"GREETING": "a = 'b'\n\"c\" $HOME", "LANG": "de_DE.UTF-8"})
    found = dict(entry.split("=", 1) for entry in done.output.rstrip("\0").split("\0"))
    found.pop("PWD", None)  # by bwrap
    assert found == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/home/agent",
        "USER": "agent",
        "LANG": "de_DE.UTF-8",
        "TERM": "dumb",
        "TMPDIR": "/tmp",
        "GREETING": "a = 'b'\n\"c\" $HOME",
    }


@pytest.mark.parametrize("env", [{"A=B": "c"}, {"": "x"}, {"A": "b\0c"}])
async def test_environment_that_cannot_be_is_refused(sandbox: Sandbox, env: dict[str, str]) -> None:
    with pytest.raises(SandboxError, match="environment variable"):
        await run(sandbox, "true", env=env)


async def test_cwd(sandbox: Sandbox) -> None:
    await shell(sandbox, "mkdir -p 'a b/c'")
    done = await run(sandbox, "pwd", cwd="/tmp/workspace/a b/c")
    assert done.output == "/tmp/workspace/a b/c\n"


async def test_exit_codes(sandbox: Sandbox) -> None:
    ends = [(await shell(sandbox, script)).end for script in ("exit 7", "kill -TERM $$", "kill -KILL $$")]
    assert [(end.code, end.reason) for end in ends] == [(7, "exited"), (143, "exited"), (137, "killed")]


async def test_a_command_that_does_not_exist(sandbox: Sandbox) -> None:
    done = await run(sandbox, "no-such-program")
    assert done.end.code != 0
    assert "no-such-program" in done.end.stderr_tail


async def test_a_working_directory_that_does_not_exist(sandbox: Sandbox) -> None:
    done = await run(sandbox, "true", cwd="/tmp/workspace/nowhere")
    assert done.end.code != 0
    assert "/tmp/workspace/nowhere" in done.end.stderr_tail


async def test_standard_input(sandbox: Sandbox) -> None:
    process = await sandbox.exec(["cat"], stdin=True)
    assert process.stdin is not None
    data = os.urandom(300_000)
    process.stdin.write(data)
    reading = asyncio.create_task(process.stdout.read())
    await process.stdin.drain()
    process.stdin.close()
    async with asyncio.timeout(60):
        assert await reading == data
        assert (await process.wait()).code == 0
    await process.kill()


async def test_without_standard_input_it_is_empty(sandbox: Sandbox) -> None:
    process = await sandbox.exec(["cat"])
    assert process.stdin is None
    async with asyncio.timeout(60):
        assert await process.stdout.read() == b""
    await process.kill()


async def test_the_end_of_standard_error_is_kept(sandbox: Sandbox) -> None:
    done = await shell(sandbox, "seq 1 200000 >&2; echo last >&2; exit 1")
    assert len(done.end.stderr_tail) == 8192
    assert done.end.stderr_tail.endswith("200000\nlast\n")


async def test_long_lines_arrive_whole(sandbox: Sandbox) -> None:
    size = 5_000_000
    process = await sandbox.exec(["sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x; echo; echo short"])
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"x" * size + b"\n"
        assert await process.stdout.readline() == b"short\n"
    await process.kill()


async def test_a_flood_of_output_waits_for_its_reader(sandbox: Sandbox) -> None:
    script = "i=0; while :; do head -c 65536 /dev/zero; i=$((i+1)); echo $i >&2; done"
    process = await sandbox.exec(["sh", "-c", script])

    async def blocked() -> int:
        """How many chunks it has written, once it has stopped."""
        deadline, last, since = time.monotonic() + 60, "", time.monotonic()
        while time.monotonic() - since < 1 or not last:
            assert time.monotonic() < deadline, "the flood does not stop"
            if process.stderr_tail() != last:
                last, since = process.stderr_tail(), time.monotonic()
            await asyncio.sleep(0.01)
        return int(last.split()[-1])

    before = await blocked()
    assert before < 16  # pipe and read-ahead, 64 kB each chunk
    async with asyncio.timeout(60):
        await process.stdout.readexactly(20 * 65536)
    assert await blocked() >= 20
    await process.kill()


async def test_kill_ends_what_the_command_started_too(sandbox: Sandbox, nap: str) -> None:
    script = f"trap '' TERM INT HUP; setsid sleep {nap} & sleep {nap} & echo ready; wait"
    process = await sandbox.exec(["sh", "-c", script])
    assert await first_line(process) == "ready"
    deadline = time.monotonic() + 60
    while len(processes_with(nap)) < 2:
        assert time.monotonic() < deadline, "the sleeps do not start"
        await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        await process.kill()
    assert processes_with(nap) == []
    assert (await process.wait()).reason == "killed"
    await process.kill()


async def test_what_a_command_leaves_running_ends_with_it(sandbox: Sandbox, nap: str) -> None:
    done = await shell(sandbox, f"setsid sleep {nap} >/dev/null 2>&1 & exit 3")
    assert done.end.code == 3
    assert processes_with(nap) == []


KEEPER = """
import socket
listener = socket.socket(socket.AF_UNIX)
listener.bind("keeper")
listener.listen()
print("ready", flush=True)
kept = []
while True:
    connection, _ = listener.accept()
    kept.append(socket.recv_fds(connection, 1, 2))
    print("kept", flush=True)
"""
GIVER = """
import socket, sys, time
connection = socket.socket(socket.AF_UNIX)
connection.connect("keeper")
socket.send_fds(connection, [b"x"], [1, 2])
time.sleep(float(sys.argv[1]))
"""


async def test_an_end_does_not_wait_for_who_has_got_hold_of_its_output(sandbox: Sandbox) -> None:
    keeper = await sandbox.exec(["python3", "-c", KEEPER])
    assert await first_line(keeper) == "ready"
    killed = await sandbox.exec(["python3", "-c", GIVER, "600"])
    assert await first_line(keeper) == "kept"
    async with asyncio.timeout(60):
        await killed.kill()
    ended = await sandbox.exec(["python3", "-c", GIVER, "0"])
    assert await first_line(keeper) == "kept"
    async with asyncio.timeout(60):
        assert (await ended.wait()).code == 0
        await ended.kill()
        await keeper.kill()


async def test_terminate_lets_the_command_finish(sandbox: Sandbox) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    process = await sandbox.exec(["sh", "-c", script])
    assert await first_line(process) == "ready"
    async with asyncio.timeout(60):
        await process.terminate(60)
        end = await process.wait()
    assert (end.code, end.reason) == (5, "exited")
    assert await process.stdout.read() == b"bye\n"


async def test_terminate_kills_in_the_end(sandbox: Sandbox) -> None:
    process = await sandbox.exec(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"])
    assert await first_line(process) == "ready"
    async with asyncio.timeout(60):
        await process.terminate(0.2)
        assert (await process.wait()).reason == "killed"


async def test_kill_right_after_start(sandbox: Sandbox, nap: str) -> None:
    for _ in range(10):
        process = await sandbox.exec(["sleep", nap])
        async with asyncio.timeout(60):
            await process.kill()
    assert processes_with(nap) == []


async def test_a_cancelled_start_leaves_nothing(sandbox: Sandbox, nap: str) -> None:
    async def never(listener: socket.socket) -> None:
        with listener:
            await asyncio.Event().wait()

    for delay in (0.0, 0.003, 0.01, 0.03, 0.3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay):
                await sandbox.exec(["sleep", nap], on_listener=never)
    await gone(nap)


async def test_folders_persist_between_commands(sandbox: Sandbox) -> None:
    await shell(sandbox, "echo w > file; echo h > ~/file; echo t > /tmp/file; chmod 600 file; umask")
    done = await shell(sandbox, "cat file ~/file; ls /tmp; stat -c %U:%a file")
    assert done.lines == ["w", "h", "workspace", "agent:600"]


async def test_the_rest_is_read_only_or_small(sandbox: Sandbox) -> None:
    done = await shell(
        sandbox,
        "for d in / /usr /etc /dev /run /var /home /proc/sys /bin; do touch $d/x 2>/dev/null && echo $d; done;"
        " head -c 70000000 /dev/zero > /tmp/big; stat -c %s /tmp/big; rm /tmp/big;"
        " head -c 70000000 /dev/zero > /dev/shm/big; stat -c %s /dev/shm/big",
    )
    assert [int(line) // 2**20 for line in done.lines] == [64, 64]


async def test_two_sandboxes_see_nothing_of_each_other(hut: AnyHut, nap: str) -> None:
    one, two = await hut.sandbox("one"), await hut.sandbox("two")
    process = await one.exec(["sh", "-c", f"echo secret > ~/s; cp ~/s /tmp/s; echo ready; exec sleep {nap}"])
    assert await first_line(process) == "ready"
    done = await shell(
        two,
        "ls -A . ~; ls /tmp; cat /proc/[0-9]*/cmdline | tr '\\0' ' ';"
        # Without a process here (0) a number that none has.
        f" kill -0 {process.pid or 2**22 + 1} 2>/dev/null && echo reached; ls -d {hut.folder} 2>/dev/null; exit 0",
    )
    assert done.lines[:4] == [".:", "", "/home/agent:", "workspace"]
    assert nap not in done.output
    assert "reached" not in done.lines
    assert str(hut.folder) not in done.lines
    await process.kill()


async def test_destroy_ends_what_runs(hut: AnyHut, nap: str) -> None:
    sandbox = await hut.sandbox()
    process = await sandbox.exec(["sh", "-c", f"setsid sleep {nap} & echo ready; sleep {nap}"])
    assert await first_line(process) == "ready"
    async with asyncio.timeout(60):
        await asyncio.gather(sandbox.destroy(), sandbox.destroy())
    assert processes_with(nap) == []
    assert (await process.wait()).reason == "killed"
    with pytest.raises(SandboxError, match="destroyed"):
        await run(sandbox, "true")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 101])
async def test_names_that_cannot_be(hut: AnyHut, name: str) -> None:
    with pytest.raises(SandboxError, match="name of a sandbox"):
        await hut.sandbox(name)


async def test_a_name_is_used_once(hut: AnyHut, sandbox: Sandbox) -> None:
    await shell(sandbox, "echo mine > file")
    with pytest.raises(SandboxError, match="exists already"):
        await hut.provider.create(Spec("one", LIMITS))
    assert (await shell(sandbox, "cat file")).output == "mine\n"
    assert await hut.provider.list() == ["one"]


async def test_what_it_says_of_itself(hut: AnyHut) -> None:
    able = await hut.provider.capabilities()
    assert ("host-programs" in able) != ("image" in able)
    problems = await hut.provider.check()
    assert [problem for problem in problems if problem.fatal and not problem.ok] == []


async def test_what_it_cannot_do_is_refused_before_anything_is_made(hut: AnyHut) -> None:
    able = await hut.provider.capabilities()
    wanted = frozenset({"kernel", "host-programs", "image"} - able)
    with pytest.raises(SandboxError, match=f"the sandbox provider '{hut.provider.name}' .*use another"):
        await hut.provider.create(Spec("one", LIMITS, needs=wanted))  # type: ignore[arg-type]
    assert await hut.provider.list() == []


async def test_a_detached_sandbox_is_attached_again(hut: AnyHut, nap: str) -> None:
    first = await hut.sandbox()
    await shell(first, "echo w > file; echo h > ~/file; chmod 0 file")
    running = await first.exec(["sleep", nap])
    (first.scratch / "left").write_text("ours")
    await first.detach()
    assert (await running.wait()).reason == "killed"
    assert await hut.provider.list() == ["one"]
    again = await hut.provider.attach("one")
    assert again is not None
    assert (await shell(again, "chmod 600 file; cat file ~/file")).lines == ["w", "h"]
    assert list(again.scratch.iterdir()) == []
    await again.destroy()
    await again.destroy()
    assert await hut.provider.list() == []
    assert await hut.provider.attach("one") is None


async def test_sweeping_removes_what_nobody_keeps(hut: AnyHut) -> None:
    for name in ("kept", "left"):
        await (await hut.sandbox(name)).detach()
    held = await hut.sandbox("held")

    async def kept(names: object) -> set[str]:
        return {"kept"}

    swept = await hut.provider.sweep(kept)
    assert swept.sandboxes == ["left"]
    assert await hut.provider.list() == ["held", "kept"]
    assert (await shell(held, "echo fine")).output == "fine\n"
    again = await hut.provider.attach("kept")
    assert again is not None
    await again.destroy()


async def test_a_way_out(sandbox: Sandbox) -> None:
    served = Served()
    done = await run(sandbox, "python3", "-c", FETCH, on_listener=served.serve)
    await served.close()
    assert done.output == "/hello\n", done.end.stderr_tail
    done = await run(sandbox, "python3", "-c", FETCH)
    assert "refused" in done.end.stderr_tail


async def test_too_much_output_ends_the_command(sandbox: Sandbox) -> None:
    for stream in ("1", "2"):
        process = await sandbox.exec(["sh", "-c", f"yes >&{stream}"], max_output=5_000_000)
        async with asyncio.timeout(60):
            while await process.stdout.read(65536):
                pass
            assert (await process.wait()).reason == "output"
        await process.kill()
    process = await sandbox.exec(["sh", "-c", "head -c 4000000 /dev/zero"], max_output=5_000_000)
    assert len(await process.stdout.read()) == 4_000_000
    assert (await process.wait()).reason == "exited"


async def test_too_much_time_ends_the_command(sandbox: Sandbox, nap: str) -> None:
    process = await sandbox.exec(["sh", "-c", f"trap '' TERM; setsid sleep {nap} & sleep {nap}"], seconds=1)
    async with asyncio.timeout(60):
        assert (await process.wait()).reason == "timeout"
    assert processes_with(nap) == []


async def test_too_much_memory_ends_the_command(hut: AnyHut) -> None:
    if "memory" not in await hut.provider.capabilities():
        pytest.skip("this provider cannot limit memory on this machine, and says so")
    if not hut.limits_memory:
        pytest.skip("what stands in for the cluster has no control groups on this machine to limit memory")
    sandbox = await hut.sandbox("eater", Limits(cpus=1, memory_mb=64, pids=64, tmp_mb=256))
    done = await run(sandbox, "python3", "-c", "x = bytearray(300_000_000)")
    assert (done.end.code, done.end.reason) == (137, "oom")


async def test_too_much_disk_ends_everything(hut: AnyHut) -> None:
    sandbox = await hut.sandbox("hoarder", replace(LIMITS, disk_mb=64))
    fine = await run(sandbox, "sh", "-c", "head -c 30000000 /dev/zero > x")
    assert fine.end.reason == "exited"
    script = "head -c 90000000 /dev/zero > y; echo written; exec sleep 600"
    process = await sandbox.exec(["sh", "-c", script])
    assert await first_line(process) == "written"
    async with asyncio.timeout(90):
        assert (await process.wait()).reason == "disk"
    # What it holds can still be carried out of it.
    assert (await shell(sandbox, "stat -c %s y")).output == "90000000\n"
