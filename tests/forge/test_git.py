"""The mirror, with real repositories as origins."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from pathlib import Path

import pytest

from taskyard.forge.git import BranchNotFoundError, GitError, Mirror, Origin, check_origin
from tests.support.git_http import git_server
from tests.support.repositories import commit_file, heads, make_bare, make_repository, run_git

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "shop")


def mirror_of(data: Path, repository: Path) -> Mirror:
    return Mirror.of(data, check_origin(str(repository)))


async def test_made_and_then_kept_up_to_date(tree: Path, tmp_path: Path) -> None:
    run_git(tree, "branch", "old")
    run_git(tree, "tag", "v1")
    mirror = mirror_of(tmp_path / "data", tree)
    await mirror.ensure()
    assert heads(mirror.path) == heads(tree)

    run_git(tree, "branch", "--delete", "old")
    run_git(tree, "branch", "old/below")
    commit_file(tree, "a.txt", "a")
    run_git(tree, "commit", "--quiet", "--amend", "--message", "rewritten")
    run_git(tree, "tag", "--force", "v1")
    await mirror.ensure()
    assert heads(mirror.path) == heads(tree)
    assert run_git(mirror.path, "rev-parse", "v1") == run_git(tree, "rev-parse", "HEAD")


async def test_only_branches_and_tags_are_taken(tree: Path, tmp_path: Path) -> None:
    run_git(tree, "update-ref", "refs/pull/1/head", "HEAD")
    mirror = mirror_of(tmp_path / "data", tree)
    await mirror.ensure()
    await mirror.ensure()
    assert run_git(mirror.path, "for-each-ref", "--format=%(refname)") == "refs/heads/main"


async def test_resolve(tree: Path, tmp_path: Path) -> None:
    first = run_git(tree, "rev-parse", "HEAD")
    run_git(tree, "branch", "release/1.0")
    tip = commit_file(tree, "a.txt", "a")
    mirror = mirror_of(tmp_path / "data", tree)
    await mirror.ensure()
    assert await mirror.resolve() == ("main", tip)
    assert await mirror.resolve("release/1.0") == ("release/1.0", first)
    for name in ("absent", "main~1", "refs/heads/main", "HEAD", "-x", "", tip):
        with pytest.raises(BranchNotFoundError, match="no branch"):
            await mirror.resolve(name)


async def test_default_branch_follows_the_origin(tree: Path, tmp_path: Path) -> None:
    bare = make_bare(tmp_path / "shop.git", tree)
    run_git(bare, "branch", "develop", "main")
    mirror = mirror_of(tmp_path / "data", bare)
    await mirror.ensure()
    assert (await mirror.resolve())[0] == "main"
    run_git(bare, "symbolic-ref", "HEAD", "refs/heads/develop")
    await mirror.ensure()
    assert (await mirror.resolve())[0] == "develop"


async def test_origin_without_a_default_branch(tree: Path, tmp_path: Path) -> None:
    run_git(tree, "branch", "--move", "one")
    run_git(tree, "checkout", "--quiet", "--detach")
    commit_file(tree, "a.txt", "a")
    mirror = mirror_of(tmp_path / "data", tree)
    await mirror.ensure()
    assert (await mirror.resolve())[0] == "one"  # the only branch
    run_git(tree, "branch", "two")
    await mirror.ensure()
    with pytest.raises(BranchNotFoundError, match="Name the branch"):
        await mirror.resolve()


async def test_empty_origin(tmp_path: Path) -> None:
    empty = tmp_path / "empty.git"
    empty.mkdir()
    run_git(empty, "init", "--quiet", "--bare", "--initial-branch=trunk")
    mirror = mirror_of(tmp_path / "data", empty)
    await mirror.ensure()
    assert await mirror.resolve() == ("trunk", None)
    assert await mirror.resolve("other") == ("other", None)
    with pytest.raises(BranchNotFoundError):
        await mirror.resolve("a..b")

    source = make_repository(tmp_path / "source", branch="trunk")
    run_git(source, "push", "--quiet", str(empty), "trunk")
    await mirror.ensure()
    assert await mirror.resolve() == ("trunk", run_git(source, "rev-parse", "HEAD"))


async def test_sha256_and_shallow_origins(tree: Path, tmp_path: Path) -> None:
    commit_file(tree, "a.txt", "a")
    run_git(tree, "clone", "--quiet", "--depth=1", f"file://{tree}", str(tmp_path / "shallow"))
    shallow = mirror_of(tmp_path / "data", tmp_path / "shallow")
    await shallow.ensure()
    tip = commit_file(tmp_path / "shallow", "b.txt", "b")
    await shallow.ensure()
    assert await shallow.resolve() == ("main", tip)

    modern = mirror_of(tmp_path / "data", make_repository(tmp_path / "modern", object_format="sha256"))
    await modern.ensure()
    await modern.ensure()
    commit = (await modern.resolve())[1]
    assert commit is not None
    assert len(commit) == 64


async def test_an_origin_that_is_gone_is_told(tree: Path, tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path / "data", tree)
    await mirror.ensure()
    tree.rename(tmp_path / "moved")
    with pytest.raises(GitError, match="does not appear to be a git repository"):
        await mirror.ensure()


async def test_a_failed_first_copy_leaves_no_half_mirror(tree: Path, tmp_path: Path) -> None:
    blob = run_git(tree, "rev-parse", "HEAD:README.md")
    loose = tree / ".git" / "objects" / blob[:2] / blob[2:]
    content = loose.read_bytes()
    loose.unlink()
    mirror = mirror_of(tmp_path / "data", tree)
    with pytest.raises(GitError):
        await mirror.ensure()
    assert not mirror.path.exists()
    loose.write_bytes(content)
    await mirror.ensure()
    assert heads(mirror.path) == heads(tree)


async def test_several_at_once(tree: Path, tmp_path: Path) -> None:
    mirrors = [mirror_of(tmp_path / "data", tree) for _ in range(4)]
    await asyncio.gather(*(mirror.ensure() for mirror in mirrors))
    assert heads(mirrors[0].path) == heads(tree)


async def test_lock_excludes_and_has_a_deadline(tree: Path, tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path / "data", tree)
    async with mirror.lock():
        with pytest.raises(GitError, match="in use by another run"):
            async with mirror_of(tmp_path / "data", tree).lock(timeout=0.1):
                pass
    async with mirror_of(tmp_path / "data", tree).lock(timeout=0.1):
        pass


async def test_locks_of_a_killed_git_are_removed_when_old(tree: Path, tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path / "data", tree)
    await mirror.ensure()
    tip = commit_file(tree, "a.txt", "a")
    left = mirror.path / "refs" / "heads" / "main.lock"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    with pytest.raises(GitError, match="lock"):
        await mirror.ensure()
    old = time.time() - 2 * 3600
    os.utime(left, (old, old))
    await mirror.ensure()
    assert (await mirror.resolve())[1] == tip


async def test_mirror_can_be_read_by_a_sandbox_of_another_uid(tree: Path, tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        mirror = mirror_of(tmp_path / "data", tree)
        await mirror.ensure()
        commit_file(tree, "a.txt", "a")
        await mirror.ensure()
    finally:
        os.umask(mask)
    closed = [
        str(path)
        for path in (mirror.path, *mirror.path.rglob("*"))
        if path.stat().st_mode & (0o005 if path.is_dir() else 0o004) != (0o005 if path.is_dir() else 0o004)
    ]
    assert closed == []


@as_root
async def test_origin_of_another_user_is_served_as_that_user(tree: Path, tmp_path: Path) -> None:
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_uid == 0 and place != Path("/tmp"):
            place.chmod(place.stat().st_mode | 0o711)
    hook = tree / ".git" / "hooks" / "post-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\nid -u > {tree}/who\n")
    hook.chmod(0o755)
    for path in (tree, *tree.rglob("*")):
        os.chown(path, 4321, 4321, follow_symlinks=False)
    mirror = mirror_of(tmp_path / "data", tree)
    await mirror.ensure()
    await mirror.ensure()
    _, commit = await mirror.resolve()
    assert commit is not None
    made = (
        (await mirror.git("commit-tree", f"{commit}^{{tree}}", "-p", commit, "-m", "x", env=_IDENTITY))
        .decode()
        .strip()
    )
    await mirror.push(made, "taskyard/x", expected=None)
    assert (tree / "who").read_text() == "4321\n"
    foreign = [path for path in tree.rglob("*") if path.lstat().st_uid != 4321]
    assert foreign == []


_IDENTITY = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
}  # fmt: skip


async def test_push_is_bound_to_the_expected_state(tree: Path, tmp_path: Path) -> None:
    bare = make_bare(tmp_path / "shop.git", tree)
    mirror = mirror_of(tmp_path / "data", bare)
    await mirror.ensure()
    _, commit = await mirror.resolve()
    assert commit is not None
    await mirror.push(commit, "taskyard/x", expected=None)
    assert await mirror.remote_head("taskyard/x") == commit
    assert await mirror.remote_head("x") is None
    made = (await mirror.git("commit-tree", f"{commit}^{{tree}}", "-m", "x", env=_IDENTITY)).decode().strip()
    with pytest.raises(GitError, match="stale info"):
        await mirror.push(made, "taskyard/x", expected=None)
    await mirror.push(made, "taskyard/x", expected=commit)
    assert heads(bare) == {"main": commit, "taskyard/x": made}


async def test_token_goes_in_a_header_and_nowhere_else(tree: Path, tmp_path: Path) -> None:
    make_bare(tmp_path / "srv" / "shop.git", tree)
    asked: list[Origin] = []

    async def credentials(origin: Origin) -> str | None:
        asked.append(origin)
        return "ghs_secret"

    with git_server(tmp_path / "srv") as server:
        basic = base64.b64encode(b"x-access-token:ghs_secret").decode()
        server.authorization = f"Basic {basic}"
        origin = check_origin(f"{server.url}/shop.git")
        mirror = Mirror.of(tmp_path / "data", origin, credentials)
        await mirror.ensure()
        await mirror.ensure()
        _, commit = await mirror.resolve()
        assert commit is not None
        await mirror.push(commit, "taskyard/x", expected=None)
        assert asked
        assert {header for _, header in server.seen} == {server.authorization}

        server.authorization = "Basic other"
        with pytest.raises(GitError) as caught:
            await mirror.ensure()
    assert "ghs_secret" not in str(caught.value)
    assert basic not in str(caught.value)
    for path in mirror.path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"ghs_secret" not in content
            assert basic.encode() not in content


async def test_token_does_not_follow_a_redirect(tree: Path, tmp_path: Path) -> None:
    make_bare(tmp_path / "srv" / "shop.git", tree)

    async def credentials(_: Origin) -> str | None:
        return "ghs_secret"

    with git_server(tmp_path / "srv") as honest, git_server(tmp_path / "srv") as thief:
        honest.redirect = thief.url
        mirror = Mirror.of(tmp_path / "data", check_origin(f"{honest.url}/shop.git"), credentials)
        with pytest.raises(GitError):
            await mirror.ensure()
        assert honest.seen
        assert thief.seen == []


async def test_missing_password_does_not_ask(tree: Path, tmp_path: Path) -> None:
    make_bare(tmp_path / "srv" / "shop.git", tree)
    with git_server(tmp_path / "srv") as server:
        server.authorization = "Basic whatever"
        with pytest.raises(GitError, match="could not read Username"):
            await Mirror.of(tmp_path / "data", check_origin(f"{server.url}/shop.git")).ensure()
