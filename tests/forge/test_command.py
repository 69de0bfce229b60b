from __future__ import annotations

import asyncio
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from taskyard.forge.command import GitError, git, masked


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A stand-in for git's wrapper that runs what a test writes into it."""
    path = tmp_path / "wrapper"
    path.write_text("#!/bin/sh\n")
    path.chmod(stat.S_IRWXU)
    return path


async def test_environment_is_ours_alone(monkeypatch: pytest.MonkeyPatch, script: Path) -> None:
    monkeypatch.setenv("CANARY_SECRET", "hunter2")
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    script.write_text("#!/bin/sh\nenv\n")
    seen = (await git("version", wrapper=[str(script)])).decode()
    assert "CANARY_SECRET" not in seen
    assert "GIT_DIR=" not in seen
    assert "HOME=/nonexistent\n" in seen
    assert "GIT_TERMINAL_PROMPT=0\n" in seen


async def test_configuration_of_the_host_does_not_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text("[user]\n\tname = Mallory\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(GitError):
        await git("config", "--get", "user.name")
    assert await git("config", "--get", "core.hooksPath") == b"/dev/null\n"


async def test_failure_tells_what_git_said() -> None:
    with pytest.raises(GitError, match="git rev-parse failed: fatal: not a git repository") as caught:
        await git("rev-parse", "HEAD", git_dir=Path("/nonexistent"))
    assert caught.value.returncode == 128


async def test_timeout_stops_the_whole_group(script: Path, tmp_path: Path) -> None:
    note = tmp_path / "child"
    # The grandchild ignores SIGTERM and holds the pipes open.
    script.write_text(
        f"#!/bin/sh\n(trap '' TERM; echo $$ >/dev/null; sh -c 'echo $PPID' > {note}; sleep 300) &\nwait\n"
    )
    begin = time.monotonic()
    with pytest.raises(GitError, match=r"did not finish within 0\.5 seconds"):
        await git("version", wrapper=[str(script)], timeout=0.5)
    assert time.monotonic() - begin < 60
    child = int(note.read_text())
    await _until(lambda: not _alive(child), "the grandchild is still there")


async def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise
        await asyncio.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_output_has_a_limit(script: Path) -> None:
    script.write_text("#!/bin/sh\nexec yes\n")
    with pytest.raises(GitError, match="more than 1000 bytes"):
        await git("version", wrapper=[str(script)], max_output=1000)
    assert await git("version", wrapper=[str(script)], max_output=1000, truncate=True) == b"y\n" * 500


async def test_flood_on_standard_error_is_drained_and_cut(script: Path) -> None:
    script.write_text("#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' x >&2\necho end >&2\nexit 7\n")
    with pytest.raises(GitError) as caught:
        await git("version", wrapper=[str(script)])
    assert caught.value.returncode == 7
    assert caught.value.stderr.endswith("xend")
    assert len(caught.value.stderr) <= 8192


async def test_input_reaches_git() -> None:
    assert await git("hash-object", "--stdin", input=b"") == b"e69de29bb2d1d6434b8b29ae775ad8c2e48c5391\n"


async def test_input_that_is_not_read_does_no_harm(script: Path) -> None:
    script.write_text("#!/bin/sh\nexit 0\n")
    assert await git("version", wrapper=[str(script)], input=b"x" * 1_000_000) == b""


async def test_cancellation_stops_git(script: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > {note}.new; mv {note}.new {note}\nexec sleep 300\n")
    task = asyncio.create_task(git("version", wrapper=[str(script)]))
    await _until(note.exists, "git's stand-in did not start")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _alive(int(note.read_text()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fatal: https://bob:s3cret@example.com/x", "fatal: https://***@example.com/x"),
        ("fatal: https://tok@example.com/x", "fatal: https://***@example.com/x"),
        ("Authorization: Basic abc\nnext", "Authorization: ***\nnext"),
        ("the token ghs_123 failed", "the token *** failed"),
    ],
)
def test_masking(text: str, shown: str) -> None:
    assert masked(text, ["ghs_123", ""]) == shown


async def test_no_descriptor_is_left_open(script: Path) -> None:
    async def fail() -> None:
        with pytest.raises(GitError):
            await git("version", wrapper=[str(script)], timeout=0.2)

    script.write_text("#!/bin/sh\nexec sleep 300\n")
    await fail()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        await fail()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


SERVER = """
import asyncio, sys
from taskyard.forge.command import git

asyncio.run(git("version", wrapper=[sys.argv[1]]))
"""


async def test_git_ends_with_its_server(script: Path, tmp_path: Path) -> None:
    """The lock of a mirror is free as soon as the server that held it is dead: nobody may work there any more."""
    note = tmp_path / "note"
    script.write_text(
        f"#!/bin/sh\ntrap 'echo ended > {note}; exit' TERM\necho begun > {note}\nwhile :; do sleep 0.05; done\n"
    )
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(script))
    await noted(note, "begun")
    server.kill()
    await server.wait()
    await noted(note, "ended")


async def noted(note: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not note.exists() or note.read_text() != f"{text}\n":
        assert time.monotonic() < deadline, f"not {text} after a minute"
        await asyncio.sleep(0.02)
