"""Keeping the state of a sandbox, and bringing it into another one. All in real sandboxes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest

from taskyard.drive.inside import output_file, run, script
from taskyard.drive.snapshot import (
    SnapshotError,
    bring_files,
    bring_forward,
    bring_workspace,
    taken_files,
    taken_workspace,
)
from taskyard.sandbox.provider import KilledError, SandboxError
from tests.support.desk import Desk
from tests.support.disk import small_disk
from tests.support.repositories import commit_file, run_git
from tests.support.sandboxes import Hut

HOME = "/home/agent"


@dataclass
class Kept:
    content: bytes
    hash: str
    head: str


async def pieces(content: bytes) -> AsyncGenerator[bytes, None]:
    for at in range(0, len(content), 10_000):
        yield content[at : at + 10_000]


@pytest.fixture
async def hut(tmp_path: Path) -> AsyncIterator[Hut]:
    hut = Hut(tmp_path / "hut")
    yield hut
    await hut.close()


@pytest.fixture
async def desk(tmp_path: Path, hut: Hut) -> Desk:
    desk = Desk(tmp_path, await hut.sandbox())
    (desk.origin / ".gitignore").write_text("*.log\n")
    run_git(desk.origin, "add", ".")
    run_git(desk.origin, "commit", "--quiet", "-m", "ignore")
    await desk.clone()
    return desk


async def keep(desk: Desk, newest: str = "") -> Kept | None:
    async with taken_workspace(desk.sandbox, desk.workspace, newest) as found:
        if found is None:
            return None
        taken, head = found
        return Kept(taken.path.read_bytes(), taken.hash, head)


async def bring(desk: Desk, hut: Hut, kept: Kept) -> Desk:
    """The same work, in a new sandbox."""
    old, workspace = desk.sandbox, desk.workspace
    desk.sandbox = await hut.sandbox("two")
    assert desk.sandbox is not old
    await desk.clone()
    desk.workspace = workspace
    async with aclosing(pieces(kept.content)) as content:
        await bring_workspace(desk.sandbox, workspace, kept.hash, kept.head, content, desk.mirror)
    return desk


async def test_everything_but_ignored_files_is_there_again(desk: Desk, hut: Hut) -> None:
    await desk.agent(
        "git checkout -q -b topic; echo one > one.txt; git add one.txt; git commit -q -m one; git branch side HEAD~1;"
        "echo changed >> README.md; rm one.txt; echo new > 'a new file.txt'; chmod +x 'a new file.txt';"
        "echo staged > staged.txt; git add staged.txt; ln -s README.md link; echo x > build.log; mkdir -p deep/er;"
        "echo d > deep/er/file"
    )
    seen = "git rev-parse HEAD side; git symbolic-ref HEAD; git status --porcelain --untracked-files=all; cat README.md"
    before = await desk.agent(seen)
    kept = await keep(desk)
    assert kept is not None
    assert await desk.agent(seen) == before, "keeping changes nothing"
    await bring(desk, hut, kept)
    after = await desk.agent(seen)
    # What was staged comes back as an untracked file: the index is the agent's own business.
    assert after == before.replace("A  staged.txt\n", "").replace("?? link", "?? link\n?? staged.txt")
    assert await desk.agent(
        "test -x 'a new file.txt' && readlink link && ls *.log 2>/dev/null || echo none"
    ) == ("README.md\nnone")


async def test_what_has_not_changed_is_not_taken_again(desk: Desk) -> None:
    await desk.agent("echo one > one.txt")
    first = await keep(desk)
    assert first is not None
    assert await keep(desk, first.hash) is None
    await desk.agent("echo x > build.log")
    assert await keep(desk, first.hash) is None, "ignored files do not count"
    await desk.agent("git branch other")
    branched = await keep(desk, first.hash)
    assert branched is not None, "a branch does"
    await desk.agent("echo two > one.txt")
    second = await keep(desk, branched.hash)
    assert second is not None
    assert len({first.hash, branched.hash, second.hash}) == 3


async def test_only_what_is_new_is_in_the_bundle(desk: Desk) -> None:
    commit_file(desk.origin, "big.bin", "".join(map(str, range(300_000))))
    await desk.clone()
    await desk.agent("echo one > one.txt")
    kept = await keep(desk)
    assert kept is not None
    assert len(kept.content) < 5_000


async def test_branches_that_were_renamed_or_removed(desk: Desk, hut: Hut) -> None:
    await desk.agent("git branch -m main trunk; git branch gone; git branch -D gone; git branch kept/deep")
    kept = await keep(desk)
    assert kept is not None
    await bring(desk, hut, kept)
    names = "git for-each-ref --format='%(refname)' refs/heads; git symbolic-ref HEAD; git status --porcelain"
    assert await desk.agent(names) == "refs/heads/kept/deep\nrefs/heads/trunk\nrefs/heads/trunk"


async def test_a_repository_without_a_commit(tmp_path: Path, hut: Hut) -> None:
    desk = Desk(tmp_path, await hut.sandbox())
    run_git(desk.origin, "update-ref", "-d", "HEAD")
    await desk.clone()
    await desk.agent("echo one > one.txt")
    kept = await keep(desk)
    assert kept is not None
    await bring(desk, hut, kept)
    assert await desk.agent("git status --porcelain --branch; cat one.txt") == (
        "## No commits yet on main...origin/main [gone]\n?? one.txt\none"
    )


async def test_a_detached_head(desk: Desk, hut: Hut) -> None:
    await desk.agent(
        "git checkout -q --detach; echo one > one.txt; git add .; git commit -q -m one; echo two > two.txt"
    )
    commit = await desk.agent("git rev-parse HEAD")
    kept = await keep(desk)
    assert kept is not None
    assert kept.head == ""
    await bring(desk, hut, kept)
    assert await desk.agent("git rev-parse HEAD; git symbolic-ref -q HEAD || cat one.txt two.txt") == (
        f"{commit}\none\ntwo"
    )


async def test_a_base_that_was_rewritten(desk: Desk, hut: Hut) -> None:
    await desk.agent("echo one > one.txt; git add .; git commit -q -m one")
    commit = await desk.agent("git rev-parse HEAD")
    kept = await keep(desk)
    assert kept is not None
    run_git(desk.origin, "checkout", "--quiet", "--orphan", "other")
    run_git(desk.origin, "commit", "--quiet", "-m", "anew")
    run_git(desk.origin, "branch", "--force", "main", "other")
    run_git(desk.origin, "checkout", "--quiet", "main")
    await bring(desk, hut, kept)
    assert await desk.agent("git rev-parse HEAD; cat one.txt") == f"{commit}\none"


class TestForward:
    """The run's branch is ahead of the checkpoint."""

    @pytest.fixture
    async def pushed(self, desk: Desk) -> str:
        run_git(desk.origin, "checkout", "--quiet", "-b", "taskyard/x")
        for file, text in (("README.md", "published\n"), ("new.txt", "published\n")):
            (desk.origin / file).write_text(text)
        run_git(desk.origin, "add", "--all")
        run_git(desk.origin, "commit", "--quiet", "-m", "later")
        await desk.mirror.ensure()
        return run_git(desk.origin, "rev-parse", "HEAD").strip()

    async def test_what_it_changes_is_as_published_and_the_rest_stays(self, desk: Desk, pushed: str) -> None:
        before = await desk.agent("git symbolic-ref HEAD")
        await desk.agent(
            "echo older > README.md; echo older > new.txt;"
            "echo mine >> .gitignore; echo mine > mine.txt; echo x > a.log"
        )
        assert await bring_forward(desk.sandbox, desk.workspace, pushed, desk.mirror)
        assert await desk.agent("git rev-parse HEAD; git symbolic-ref HEAD") == f"{pushed}\n{before}"
        assert await desk.agent("cat README.md new.txt mine.txt a.log") == "published\npublished\nmine\nx"
        assert await desk.agent("git status --porcelain") == "M .gitignore\n?? mine.txt"
        assert not await bring_forward(desk.sandbox, desk.workspace, pushed, desk.mirror), "it is there"

    async def test_a_file_that_is_gone(self, desk: Desk) -> None:
        run_git(desk.origin, "rm", "--quiet", "README.md")
        run_git(desk.origin, "commit", "--quiet", "-m", "less")
        await desk.mirror.ensure()
        commit = run_git(desk.origin, "rev-parse", "HEAD").strip()
        await desk.agent("echo older > README.md")
        assert await bring_forward(desk.sandbox, desk.workspace, commit, desk.mirror)
        assert await desk.agent("ls; git status --porcelain") == ""

    async def test_work_that_it_does_not_build_on(self, desk: Desk, pushed: str) -> None:
        await desk.agent("echo other > other.txt; git add .; git commit -q -m other; echo more > more.txt")
        seen = "git rev-parse HEAD; git status --porcelain; ls; cat README.md"
        before = await desk.agent(seen)
        assert not await bring_forward(desk.sandbox, desk.workspace, pushed, desk.mirror)
        assert await desk.agent(seen) == before

    async def test_a_clone_of_a_base_that_has_moved_on(self, desk: Desk, pushed: str) -> None:
        run_git(desk.origin, "checkout", "--quiet", "main")
        commit_file(desk.origin, "README.md", "moved on\n", "elsewhere")
        commit_file(desk.origin, "other.txt", "other\n", "and more")
        await desk.clone()
        assert await bring_forward(desk.sandbox, desk.workspace, pushed, desk.mirror, fresh=True)
        assert (
            await desk.agent("git rev-parse HEAD; git status --porcelain; cat README.md")
            == f"{pushed}\npublished"
        )
        assert not await bring_forward(desk.sandbox, desk.workspace, pushed, desk.mirror, fresh=True)

    async def test_a_repository_without_a_commit(self, tmp_path: Path, hut: Hut) -> None:
        desk = Desk(tmp_path, await hut.sandbox())
        run_git(desk.origin, "checkout", "--quiet", "--orphan", "empty")
        run_git(desk.origin, "branch", "-D", "main")
        await desk.clone()
        (desk.origin / "first.txt").write_text("first\n")
        run_git(desk.origin, "add", "first.txt")
        run_git(desk.origin, "commit", "--quiet", "-m", "first")
        await desk.mirror.ensure()
        commit = run_git(desk.origin, "rev-parse", "HEAD").strip()
        assert await bring_forward(desk.sandbox, desk.workspace, commit, desk.mirror)
        assert await desk.agent("git rev-parse HEAD; cat first.txt") == f"{commit}\nfirst"

    async def test_a_commit_that_the_mirror_lacks(self, desk: Desk) -> None:
        with pytest.raises(SnapshotError, match="could not be brought to what was published"):
            await bring_forward(desk.sandbox, desk.workspace, "1" * 40, desk.mirror)


async def test_a_damaged_snapshot(desk: Desk, hut: Hut) -> None:
    await desk.agent("echo one > one.txt")
    kept = await keep(desk)
    assert kept is not None
    kept.content = kept.content[:-40]
    with pytest.raises(SnapshotError, match="could not be brought back"):
        await bring(desk, hut, kept)


async def test_a_snapshot_of_something_else(desk: Desk, hut: Hut) -> None:
    await desk.agent("echo one > one.txt")
    kept = await keep(desk)
    assert kept is not None
    kept.hash = "0" * 40
    with pytest.raises(SnapshotError, match="another one"):
        await bring(desk, hut, kept)


async def test_a_workspace_that_is_no_repository_any_more(desk: Desk) -> None:
    await desk.agent("rm -rf .git")
    with pytest.raises(SnapshotError, match="could not be kept"):
        await keep(desk)


async def test_files_of_the_agent(desk: Desk, hut: Hut) -> None:
    folder = f"{HOME}/.agent"
    made = f"mkdir -p {folder}/sessions/a; echo 1 > {folder}/sessions/a/x; echo 2 > {folder}/no"
    await run(desk.sandbox, script(made), timeout=20)
    async with taken_files(desk.sandbox, folder, ["sessions", "absent"], "", 10_000) as taken:
        assert taken is not None
        content, digest = taken.path.read_bytes(), taken.hash
    async with taken_files(desk.sandbox, folder, ["sessions"], digest, 10_000) as again:
        assert again is None
    other = await hut.sandbox("two")
    await bring_files(other, folder, pieces(content))
    code, output, _ = await run(
        other, script(f"cd {folder} && find . -type f && cat sessions/a/x"), timeout=20
    )
    assert (code, output.split()) == (0, [b"./sessions/a/x", b"1"])
    async with taken_files(desk.sandbox, f"{HOME}/nothing", ["sessions"], "", 10_000) as none:
        assert none is None
    with pytest.raises(SnapshotError, match="could not be brought back"):
        await bring_files(other, folder, pieces(b"no archive"))


async def test_files_that_are_too_large(desk: Desk) -> None:
    await run(
        desk.sandbox, script(f"mkdir -p {HOME}/s && head -c 300000 /dev/urandom > {HOME}/s/x"), timeout=20
    )
    with pytest.raises(SnapshotError, match="more than"):
        async with taken_files(desk.sandbox, HOME, ["s"], "", 100_000):
            pass


async def test_a_file_that_does_not_fit_on_the_disk(desk: Desk, tmp_path: Path) -> None:
    """A part of it would: it must not pass for the whole."""
    argv = script("head -c 60000 /dev/zero")
    with small_disk(tmp_path / "small", "40k") as folder, pytest.raises(SandboxError, match="No space left"):
        async with output_file(desk.sandbox, argv, timeout=20, max_bytes=10**6, folder=folder):
            pass


async def test_a_script_that_is_killed(desk: Desk) -> None:
    with pytest.raises(KilledError):
        await run(desk.sandbox, script("kill -9 $$"), timeout=20)
    with pytest.raises(KilledError):
        await run(desk.sandbox, script("echo error: index-pack died of signal 9 >&2; exit 128"), timeout=20)
    assert (await run(desk.sandbox, script("exit 7"), timeout=20))[0] == 7
