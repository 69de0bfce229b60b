"""Cloning into a sandbox, committing what an agent left, and carrying it out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskyard.drive.workspace import (
    PublishError,
    Workspace,
    WorkspaceError,
    prepare,
)
from taskyard.forge.git import Mirror, check_origin
from tests.support.desk import Desk
from tests.support.git_http import git_server
from tests.support.plain_sandbox import PlainSandbox
from tests.support.repositories import commit_file, make_bare, run_git


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    sandbox = PlainSandbox(tmp_path / "sandbox")
    yield Desk(tmp_path, sandbox)
    await sandbox.destroy()


async def test_clone_of_the_default_branch(desk: Desk) -> None:
    run_git(desk.origin, "branch", "other")
    run_git(desk.origin, "tag", "v1")
    tip = commit_file(desk.origin, "a.txt", "a")
    workspace = await desk.clone()
    assert workspace == Workspace("/tmp/workspace/repos/acme/shop", "main", tip)
    assert (
        await desk.agent("git rev-parse HEAD && git symbolic-ref HEAD && cat a.txt")
        == f"{tip}\nrefs/heads/main\na"
    )
    assert await desk.agent("git status --porcelain") == ""
    # Whole history and tags of this branch, no other branch.
    assert await desk.agent("git rev-list --count HEAD") == "2"
    assert await desk.agent("git describe --tags") == f"v1-1-g{tip[:7]}"
    assert (
        await desk.agent("git branch --remotes --format='%(refname:lstrip=2)'") == "origin/HEAD\norigin/main"
    )
    assert await desk.agent("git config user.name") == "Taskyard"
    # A local origin is named, not located.
    assert await desk.agent("git remote get-url origin") == "Acme/Shop"
    assert str(desk.origin) not in await desk.agent("cat .git/config")


async def test_clone_of_a_named_branch(desk: Desk) -> None:
    run_git(desk.origin, "checkout", "--quiet", "-b", "feature/x")
    tip = commit_file(desk.origin, "x.txt", "x")
    run_git(desk.origin, "checkout", "--quiet", "main")
    workspace = await desk.clone("feature/x")
    assert (workspace.base_branch, workspace.base_commit) == ("feature/x", tip)
    assert await desk.agent("git symbolic-ref --short HEAD; cat x.txt") == "feature/x\nx"


async def test_second_clone_replaces_the_first_and_sees_new_commits(desk: Desk) -> None:
    await desk.clone()
    await desk.agent("echo junk > junk")
    tip = commit_file(desk.origin, "a.txt", "a")
    await desk.clone()
    assert await desk.agent("ls; git rev-parse HEAD") == f"README.md\na.txt\n{tip}"


async def test_clone_of_a_url_keeps_the_url_and_no_token(desk: Desk, tmp_path: Path) -> None:
    make_bare(tmp_path / "srv" / "shop.git", desk.origin)

    async def credentials(_: object) -> str | None:
        return "ghs_secret"

    with git_server(tmp_path / "srv") as server:
        desk.mirror = Mirror.of(tmp_path / "data", check_origin(f"{server.url}/shop.git"), credentials)
        await desk.clone()
        assert await desk.agent("git remote get-url origin") == f"{server.url}/shop.git"
        assert await desk.agent("grep -rl ghs_secret . || true") == ""


async def test_objects_are_copied_not_linked(desk: Desk) -> None:
    await desk.mirror.ensure()
    before = _objects(desk.mirror.path)
    await desk.clone()
    await desk.agent(
        "find .git -type f -exec chmod u+w {} +; echo a > a; git add a; git commit --quiet -m a; git gc --quiet"
    )
    await desk.bundle()
    assert _objects(desk.mirror.path) == before
    assert not any(count > 1 for *_, count in before.values())


def _objects(repository: Path) -> dict[Path, tuple[int, int, int, int]]:
    found = {}
    for path in (repository / "objects").rglob("*"):
        status = path.stat()
        if path.is_file():
            found[path] = (status.st_uid, status.st_gid, status.st_mode, status.st_nlink)
    return found


async def test_repository_name_may_start_with_a_dot(desk: Desk) -> None:
    workspace = await prepare(desk.sandbox, desk.mirror, None, "Acme/.github")
    assert workspace.path == "/tmp/workspace/repos/acme/.github"


async def test_identity_of_the_user(desk: Desk) -> None:
    desk.workspace = await prepare(
        desk.sandbox, desk.mirror, None, "acme/shop", user_name="Eve 'O' Hara", user_email="eve@example.com"
    )
    assert await desk.agent("git config user.name; git config user.email") == "Eve 'O' Hara\neve@example.com"


async def test_unknown_branch(desk: Desk) -> None:
    with pytest.raises(WorkspaceError, match=r"^Failed to checkout branch absent: .* has no branch 'absent'"):
        await desk.clone("absent")


async def test_origin_that_is_gone(desk: Desk, tmp_path: Path) -> None:
    desk.origin.rename(tmp_path / "elsewhere")
    with pytest.raises(WorkspaceError, match=r"^Failed to clone repository Acme/Shop: git clone failed"):
        await desk.clone()


@pytest.mark.parametrize("name", ["shop", "../shop", "a/..", "a/b/c", "a/", "a/b c", "a/.git"])
async def test_repository_names_that_are_no_folder(desk: Desk, name: str) -> None:
    with pytest.raises(WorkspaceError, match=r"^Failed to clone repository"):
        await prepare(desk.sandbox, desk.mirror, None, name)


async def test_clone_that_fails_inside_says_why(desk: Desk) -> None:
    await desk.mirror.ensure()
    process = await desk.sandbox.exec(["/bin/sh", "-c", "touch /tmp/workspace/repos"])
    await process.wait()
    await process.kill()
    with pytest.raises(
        WorkspaceError, match=r"^Failed to clone repository Acme/Shop: (?s:.)*(File exists|Not a dir)"
    ):
        await desk.clone()


async def test_clone_has_a_time_limit(desk: Desk) -> None:
    with pytest.raises(WorkspaceError, match="longer than 0 seconds"):
        await prepare(desk.sandbox, desk.mirror, None, "acme/shop", timeout=0)


async def test_empty_repository(desk: Desk, tmp_path: Path) -> None:
    empty = tmp_path / "empty.git"
    empty.mkdir()
    run_git(empty, "init", "--quiet", "--bare", "--initial-branch=trunk")
    desk.mirror = Mirror.of(tmp_path / "data", check_origin(str(empty)))
    workspace = await desk.clone()
    assert (workspace.base_branch, workspace.base_commit) == ("trunk", None)
    assert await desk.leftovers() == (False, None)
    assert await desk.bundle() is None
    await desk.agent("echo hello > hello")
    assert await desk.leftovers() == (True, None)
    assert await desk.agent("git symbolic-ref --short HEAD; git rev-list --count HEAD") == "trunk\n1"
    assert await desk.bundle() is not None


async def test_nothing_left(desk: Desk) -> None:
    await desk.clone()
    assert await desk.leftovers() == (False, None)
    assert await desk.bundle() is None
    assert list(desk.folder.iterdir()) == []


async def test_leftovers_are_committed_by_taskyard(desk: Desk) -> None:
    await desk.clone()
    await desk.agent(
        "echo '*.log' > .gitignore; echo x > x.log; mkdir d; echo y > d/y; rm README.md; echo z > 'a\nb'"
    )
    assert await desk.leftovers("# Fix\nthe  importer") == (True, None)
    assert await desk.agent("git log -1 --format='%an <%ae> %cn%n%B'") == (
        "Taskyard <taskyard@localhost> Taskyard\n# Fix the importer\n\nTask: TY-7"
    )
    assert (
        await desk.agent("git -c core.quotePath=false ls-files -z | tr '\\0' '|'") == ".gitignore|a\nb|d/y|"
    )
    assert await desk.leftovers() == (False, None)


async def test_title_may_be_empty_or_odd(desk: Desk) -> None:
    await desk.clone()
    await desk.agent("echo x > x")
    assert (await desk.leftovers(" \n"))[0]
    assert await desk.agent("git log -1 --format=%B") == "Task: TY-7"
    await desk.agent("echo y > y")
    assert (await desk.leftovers("--amend $(touch /tmp/h) `id`\0"))[0]
    assert await desk.agent("git log -1 --format=%s") == "--amend $(touch /tmp/h) `id`"


async def test_other_branch_and_detached_head(desk: Desk) -> None:
    workspace = await desk.clone()
    await desk.agent("git checkout --quiet -b mine; echo x > x")
    assert await desk.leftovers() == (True, None)
    assert await desk.agent("git symbolic-ref --short HEAD") == "mine"
    await desk.agent("git checkout --quiet --detach; echo y > y")
    assert await desk.leftovers() == (True, None)
    path = await desk.bundle()
    assert path is not None
    assert run_git(desk.mirror.path, "bundle", "list-heads", str(path)).endswith(" HEAD")
    assert await desk.agent(f"git rev-list --count {workspace.base_commit}..HEAD") == "2"


async def test_merge_in_progress_is_committed_and_told(desk: Desk) -> None:
    await desk.clone()
    await desk.agent(
        "git checkout --quiet -b side; echo side > README.md; git commit --quiet -am side;"
        "git checkout --quiet main; echo main > README.md; git commit --quiet -am main; git merge side || true"
    )
    committed, note = await desk.leftovers()
    assert committed
    assert note is not None
    assert "merge was still in progress" in note
    assert await desk.agent("git log -1 --format=%P | wc -w") == "2"


async def test_rebase_in_progress_keeps_all_commits(desk: Desk) -> None:
    await desk.clone()
    await desk.agent(
        "git checkout --quiet -b side; echo side > README.md; git commit --quiet -am side; echo 2 > two; git add two;"
        "git commit --quiet -m two;"
        "git checkout --quiet main; echo main > README.md; git commit --quiet -am main;"
        "git checkout --quiet side; git rebase main >/dev/null 2>&1 || true; echo loose > loose"
    )
    committed, note = await desk.leftovers()
    assert committed
    assert note is not None
    assert "rebase was still in progress; it was aborted" in note
    assert await desk.agent("git symbolic-ref --short HEAD; git log --format=%s") == (
        "side\nFix the importer\ntwo\nside\nfirst"
    )


async def test_stale_locks_and_hooks(desk: Desk) -> None:
    await desk.clone()
    await desk.agent(
        "touch .git/index.lock .git/HEAD.lock .git/refs/heads/main.lock; mkdir -p .git/hooks;"
        "for hook in pre-commit commit-msg; do"
        "  printf '#!/bin/sh\\nexit 1\\n' > .git/hooks/$hook; chmod +x .git/hooks/$hook; done;"
        "git config commit.gpgSign true; git config gpg.program false; echo x > x"
    )
    assert await desk.leftovers() == (True, None)


async def test_nested_repositories_stay_out(desk: Desk) -> None:
    await desk.clone()
    await desk.agent("git init --quiet 'new dir/[a]'; git clone --quiet . vendored; echo x > 'new dir/x'")
    assert await desk.leftovers() == (True, None)
    assert await desk.agent("git ls-files") == "README.md\nnew dir/x"


@pytest.mark.parametrize(
    "damage",
    [
        "rm -rf .git",
        "mv .git g; ln -s /nonexistent .git",
        "rm .git/HEAD",
        "cd ..; rm -rf shop",
        "> .git/config; echo '[' > .git/config",
    ],
)
async def test_repository_that_is_gone_is_told(desk: Desk, damage: str) -> None:
    await desk.clone()
    await desk.agent(damage)
    with pytest.raises(PublishError, match="could not be committed"):
        await desk.leftovers()
    with pytest.raises(PublishError, match="could not be bundled"):
        await desk.bundle()
    assert list(desk.folder.iterdir()) == []


async def test_repository_above_is_not_taken_for_it(desk: Desk) -> None:
    await desk.clone()
    await desk.agent("rm -rf .git; git init --quiet ..; echo x > x")
    with pytest.raises(PublishError, match="gone or damaged"):
        await desk.leftovers()


async def test_bundle_has_only_the_new_commits(desk: Desk) -> None:
    workspace = await desk.clone()
    await desk.agent("echo x > x; git add x; git commit --quiet -m x; git tag mine; git branch more")
    path = await desk.bundle()
    assert path is not None
    assert path.parent == desk.folder
    text = path.read_bytes().partition(b"\n\n")[0].decode()
    assert text.splitlines()[1].startswith(f"-{workspace.base_commit}")
    assert len(text.splitlines()) == 3


async def test_bundle_of_a_shortened_history_is_none(desk: Desk) -> None:
    commit_file(desk.origin, "a.txt", "a")
    await desk.clone()
    await desk.agent("git reset --quiet --hard HEAD~1")
    assert await desk.bundle() is None


async def test_bundle_has_a_size_limit(desk: Desk) -> None:
    await desk.clone()
    await desk.agent("head -c 3000000 /dev/urandom > big; git add big; git commit --quiet -m big")
    with pytest.raises(PublishError, match="larger than the limit of 1 MB"):
        await desk.bundle(2**20)
    assert list(desk.folder.iterdir()) == []


async def test_bundle_without_its_base_is_an_error(desk: Desk) -> None:
    await desk.clone()
    desk.workspace = Workspace(desk.workspace.path, "main", "1" * 40)
    with pytest.raises(PublishError, match="could not be bundled"):
        await desk.bundle()
