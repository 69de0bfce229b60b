"""What a sandbox does for its user: commands, streams, folders, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import uvloop

from taskyard.sandbox.bubblewrap import BubblewrapSandbox
from taskyard.sandbox.provider import Mount, SandboxError
from tests.support.sandboxes import Done, Hut, first_line, gone, processes_with, run, shell

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives each sandbox its own uid")


async def test_a_command_runs_as_the_agent_in_the_workspace(sandbox: BubblewrapSandbox) -> None:
    done = await shell(sandbox, "id -un; id -u; id -G; pwd; hostname; echo ~")
    assert done.lines == ["agent", "1000", "1000", "/tmp/workspace", "sandbox", "/home/agent"]
    assert (done.end.code, done.end.reason) == (0, "exited")


async def test_usual_tools_work(sandbox: BubblewrapSandbox) -> None:
    scripts = {
        "git": "git init -q r && cd r && git config user.name A && git config user.email a@b &&"
        " echo x > f && git add f && git commit -qm m && git log --format=%s",
        "node": "node -e 'console.log(os.userInfo().username, os.cpus().length > 0)'",
        "python3": "python3 -c 'import multiprocessing as m; print(m.Pool(2).map(abs, [-1, -2]))'",
        "threads": "python3 -c 'from concurrent.futures import ThreadPoolExecutor as T;"
        " print(sum(T(8).map(abs, range(-100, 0))))'",
        "resolve": "python3 -c 'import socket; print(socket.gethostbyname(\"localhost\"))'",
    }
    found = {name: await shell(sandbox, script) for name, script in scripts.items()}
    assert {name: (done.output.strip(), done.end.code) for name, done in found.items()} == {
        "git": ("m", 0),
        "node": ("agent true", 0),
        "python3": ("[1, 2]", 0),
        "threads": ("5050", 0),
        "resolve": ("127.0.0.1", 0),
    }, {name: done.end.stderr_tail for name, done in found.items()}


async def test_mounts(hut: Hut, tmp_path: Path) -> None:
    secret = tmp_path / "private"
    secret.mkdir(mode=0o700)  # nobody but its owner gets through
    for name in ("spec", "extra"):
        (secret / name).mkdir(mode=0o755)
        (secret / name / "file").write_text(name)
    sandbox = await hut.sandbox(mounts=(Mount(secret / "spec", "/opt/spec"),))
    extra = [
        Mount(secret / "extra" / "file", "/run/extra"),
        Mount(Path("/opt/spec/file"), "/opt/link", symlink=True),
    ]
    done = await run(sandbox, "cat", "/opt/spec/file", "/run/extra", "/opt/link", mounts=extra)
    assert done.output == "specextraspec"
    assert (await shell(sandbox, "ls /run/extra; touch /opt/spec/x")).end.code != 0
    assert not (secret / "spec" / "x").exists()


@needs_root
async def test_a_writable_mount(sandbox: BubblewrapSandbox, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    done = await run(
        sandbox, "touch", "/opt/out/x", mounts=[Mount(tmp_path / "out", "/opt/out", writable=True)]
    )
    assert done.end.code == 0
    assert (tmp_path / "out" / "x").stat().st_uid != 0


@pytest.mark.parametrize(
    "target",
    ["relative", "/opt/../etc", "/", "/tmp", "/home", "/tmp/workspace", "/tmp/workspace/.git/hooks",
     "/home/agent/x", "/proc/x", "/dev/shm"],
)  # fmt: skip
async def test_mounts_that_are_refused(sandbox: BubblewrapSandbox, tmp_path: Path, target: str) -> None:
    with pytest.raises(SandboxError, match="mount"):
        await run(sandbox, "true", mounts=[Mount(tmp_path, target)])


async def test_a_mount_of_nothing_is_refused(sandbox: BubblewrapSandbox, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"missing .* does not exist"):
        await run(sandbox, "true", mounts=[Mount(tmp_path / "missing", "/opt/x")])


@needs_root
async def test_each_sandbox_has_a_uid_of_its_own(hut: Hut) -> None:
    sandboxes = [await hut.sandbox(name) for name in ("one", "two", "three")]
    for sandbox in sandboxes:
        await shell(sandbox, "touch file")
    root = hut.folder / "sandboxes"
    uids = {(root / sandbox.id / "workspace" / "file").stat().st_uid for sandbox in sandboxes}
    assert len(uids) == 3
    assert all(230000 <= uid <= 295535 for uid in uids)
    assert all((root / sandbox.id).stat().st_mode & 0o777 == 0o700 for sandbox in sandboxes)
    # Another sandbox's user does not get in, though it is told where.
    other = root / "one" / "workspace" / "file"
    asked = subprocess.run(
        ["setpriv", f"--reuid={max(uids)}", f"--regid={max(uids)}", "--clear-groups", "cat", other],
        capture_output=True, check=False,
    )  # fmt: skip
    assert asked.returncode != 0


HOSTILE = """
set -e
mkdir -p a/b/c locked/in && touch locked/in/f && chmod 0 locked/in locked
ln -s /etc/passwd link; ln -s .. up; ln -s "$OUTSIDE" out; ln -s / ~/root
mkfifo pipe; : > "$(printf 'new\\nline')"; : > -rf; : > "$(printf '\\377\\376')"
cp /bin/true setuid && chmod 4755 setuid
python3 - <<'END'
import os
for level in range(3000):
    os.mkdir("d" * 50); os.chdir("d" * 50)
END
mkdir many && cd many && seq 1 5000 | xargs touch
chmod 0 . ~
"""


async def test_destroy_removes_whatever_is_there(hut: Hut, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    (outside / "keep").write_text("kept")
    sandbox = await hut.sandbox()
    done = await shell(sandbox, HOSTILE, env={"OUTSIDE": str(outside)})
    assert done.end.code == 0, done.end.stderr_tail
    await sandbox.destroy()
    assert list((hut.folder / "sandboxes").iterdir()) == []
    assert (outside / "keep").read_text() == "kept"
    assert await hut.provider.list() == []
    await sandbox.destroy()


async def test_destroy_while_a_command_starts(hut: Hut) -> None:
    sandbox = await hut.sandbox()
    starts = [asyncio.create_task(run(sandbox, "sleep", "7654327")) for _ in range(3)]
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await sandbox.destroy()
        results = await asyncio.gather(*starts, return_exceptions=True)
    assert processes_with("7654327") == []
    assert not (hut.folder / "sandboxes" / "one").exists()
    for result in results:
        assert isinstance(result, SandboxError) or (
            isinstance(result, Done) and result.end.reason == "killed"
        )


LEFT_BEHIND = """
import asyncio, sys
from pathlib import Path
from tests.support.sandboxes import Hut

async def main():
    hut = Hut(Path(sys.argv[1]))
    sandbox = await hut.sandbox("left")
    process = await sandbox.exec(["sh", "-c", "echo work > file; echo ready; setsid sleep 7654328"])
    print((await process.stdout.readline()).decode(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_server_leaves_no_process_and_its_sandbox_can_be_taken_over(hut: Hut) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LEFT_BEHIND, str(hut.folder), stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    async with asyncio.timeout(60):
        assert await server.stdout.readline() == b"ready\n"
        assert await hut.provider.list() == ["left"]
        with pytest.raises(SandboxError, match="in use by another process"):
            await hut.provider.attach("left")
        server.kill()
        await server.communicate()
    await gone("7654328")
    sandbox = await hut.provider.attach("left")
    assert sandbox is not None
    hut.made.append(sandbox)
    assert (await shell(sandbox, "cat file")).output == "work\n"
    await sandbox.destroy()
    assert await hut.provider.attach("left") is None


async def test_a_damaged_folder_can_be_destroyed_only(hut: Hut) -> None:
    folder = hut.folder / "sandboxes" / "broken"
    (folder / "workspace").mkdir(parents=True)
    (folder / "sandbox.json").write_text("{")
    sandbox = await hut.provider.attach("broken")
    assert sandbox is not None
    with pytest.raises(SandboxError, match="damaged"):
        await run(sandbox, "true")
    await sandbox.destroy()
    assert await hut.provider.list() == []


def test_another_thread_is_refused(tmp_path: Path) -> None:
    made: list[BubblewrapSandbox] = []
    hut = Hut(tmp_path / "data")

    async def make() -> None:
        made.append(await hut.sandbox())

    asyncio.run(make())
    refusals: list[str] = []

    def use() -> None:
        try:
            asyncio.run(run(made[0], "true"))
        except RuntimeError as error:
            refusals.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    asyncio.run(hut.close())
    assert len(refusals) == 1
    assert "thread" in refusals[0]


def test_on_uvloop(tmp_path: Path) -> None:
    async def main() -> None:
        hut = Hut(tmp_path / "data")
        sandbox = await hut.sandbox()
        process = await sandbox.exec(
            ["sh", "-c", "read line; echo got $line; exec sleep 7654329"], stdin=True
        )
        assert process.stdin is not None
        process.stdin.write(b"hello\n")
        await process.stdin.drain()
        assert await first_line(process) == "got hello"
        async with asyncio.timeout(60):
            await process.kill()
        assert (await process.wait()).reason == "killed"
        assert (await shell(sandbox, "exit 9")).end.code == 9
        await sandbox.destroy()
        assert processes_with("7654329") == []
        assert await hut.provider.list() == []

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_ordinary_commands_leave_no_descriptor_open(sandbox: BubblewrapSandbox) -> None:
    async def handler(listener: socket.socket) -> None:
        listener.close()

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    await run(sandbox, "true", on_listener=handler)
    before = count()
    for _ in range(5):
        await run(sandbox, "true", on_listener=handler)
        await run(sandbox, "no-such-program")
        with pytest.raises(SandboxError):
            await run(sandbox, "true", mounts=[Mount(Path("/nowhere"), "/opt/x")])
    assert count() <= before + 1, textwrap.shorten(str(list(Path("/proc/self/fd").iterdir())), 2000)
