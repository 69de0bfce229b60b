"""From a bundle that a sandbox handed out to a branch of the origin."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from taskyard.drive.publish import DiffStat, Published, branch_name, diff, diff_stat, publish
from taskyard.drive.workspace import PublishError, Workspace, bundle, commit_leftovers, prepare
from taskyard.events.store import LeaseLostError
from taskyard.forge.git import GitError, Mirror, check_origin
from taskyard.sandbox.bubblewrap import BubblewrapProvider
from taskyard.sandbox.provider import Limits, Sandbox, Spec
from taskyard.settings import Settings
from tests.support.git_http import git_server
from tests.support.repositories import commit_file, heads, make_bare, make_repository, run_git

BRANCH = "taskyard/ty-7-0123abcd"


@dataclass
class Bench:
    """A bare origin, its mirror, and a clone in which a test plays the agent, without a sandbox."""

    folder: Path
    origin: Path
    mirror: Mirror
    clone: Path
    base: str | None

    def bundle(self, *revisions: str) -> Path:
        path = self.folder / "run.bundle"
        path.unlink(missing_ok=True)
        default = ["HEAD", f"^{self.base}"] if self.base else ["HEAD"]
        run_git(self.clone, "bundle", "create", "--quiet", str(path), *(revisions or default))
        return path

    async def publish(
        self, path: Path | None = None, branch: str = BRANCH, previous: str | None = None
    ) -> Published:
        return await publish(
            self.mirror,
            path or self.bundle(),
            self.base,
            branch,
            run_id="run-1",
            base_branch="main",
            previous=previous,
        )

    def refs(self) -> str:
        return run_git(self.mirror.path, "for-each-ref", "--format=%(refname)")

    def objects(self) -> set[str]:
        listed = run_git(self.mirror.path, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)")
        return set(listed.splitlines())


async def make_bench(folder: Path, origin: Path) -> Bench:
    mirror = Mirror.of(folder / "data", check_origin(str(origin)))
    await mirror.ensure()
    _, base = await mirror.resolve()
    run_git(folder, "clone", "--quiet", str(origin), str(folder / "clone"))
    return Bench(folder, origin, mirror, folder / "clone", base)


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    tree = make_repository(tmp_path / "tree")
    return await make_bench(tmp_path, make_bare(tmp_path / "origin.git", tree))


def test_branch_name() -> None:
    assert branch_name("TY-7", "0123ABCD-4567-89ab-cdef-0123456789ab") == "taskyard/ty-7-0123abcd"
    assert branch_name("a b/../c~^:", "0123abcd") == "taskyard/a-b-c-0123abcd"
    assert branch_name("--", "0123abcd") == "taskyard/task-0123abcd"


async def test_publishes_one_branch_and_nothing_else(bench: Bench) -> None:
    run_git(bench.clone, "tag", "mine")
    commit_file(bench.clone, "a.txt", "one\n")
    tip = commit_file(bench.clone, "README.md", "# Shop\nmore\n")
    published = await bench.publish()
    assert published == Published(BRANCH, tip, 2, DiffStat(2, 2, 0), bench.base)
    assert heads(bench.origin) == {"main": bench.base, BRANCH: tip}
    assert run_git(bench.origin, "tag") == ""
    assert bench.refs() == f"refs/heads/main\nrefs/heads/{BRANCH}"
    assert sorted(path.suffix for path in bench.mirror.path.parent.iterdir()) == [".git", ".lock"]
    await bench.mirror.ensure()
    assert await bench.mirror.resolve(BRANCH) == (BRANCH, tip)


async def test_working_tree_as_origin(tmp_path: Path) -> None:
    tree = make_repository(tmp_path / "tree")
    bench = await make_bench(tmp_path, tree)
    tip = commit_file(bench.clone, "a.txt", "a")
    await bench.publish()
    assert heads(tree) == {"main": bench.base, BRANCH: tip}
    assert not (tree / "a.txt").exists()

    run_git(tree, "checkout", "--quiet", BRANCH)
    commit_file(bench.clone, "b.txt", "b")
    with pytest.raises(PublishError, match="is checked out in"):
        await bench.publish(previous=tip)
    assert heads(tree)[BRANCH] == tip


async def test_over_http(bench: Bench) -> None:
    tip = commit_file(bench.clone, "a.txt", "a")
    with git_server(bench.folder) as server:
        bench.mirror = Mirror.of(bench.folder / "data", check_origin(f"{server.url}/origin.git"))
        await bench.mirror.ensure()
        await bench.publish()
    assert heads(bench.origin) == {"main": bench.base, BRANCH: tip}


async def test_twice_is_once(bench: Bench) -> None:
    commit_file(bench.clone, "a.txt", "a")
    assert await bench.publish() == await bench.publish()


async def test_follow_up_forward_and_rewritten(bench: Bench) -> None:
    first = commit_file(bench.clone, "a.txt", "a")
    await bench.publish()
    second = commit_file(bench.clone, "b.txt", "b")
    assert (await bench.publish(previous=first)).commits == 2
    run_git(bench.clone, "commit", "--quiet", "--amend", "--message", "rewritten")
    await bench.publish(previous=second)
    assert heads(bench.origin)[BRANCH] == run_git(bench.clone, "rev-parse", "HEAD")


async def test_follow_up_after_the_answer_was_lost(bench: Bench) -> None:
    commit_file(bench.clone, "a.txt", "a")
    await bench.publish()
    tip = commit_file(bench.clone, "b.txt", "b")
    await bench.publish(previous=None)
    assert heads(bench.origin)[BRANCH] == tip


async def test_follow_up_makes_a_deleted_branch_again(bench: Bench) -> None:
    tip = commit_file(bench.clone, "a.txt", "a")
    await bench.publish()
    run_git(bench.origin, "branch", "--delete", "--force", BRANCH)
    await bench.publish(previous=tip)
    assert heads(bench.origin)[BRANCH] == tip


async def test_a_push_that_its_worker_did_not_live_to_tell(bench: Bench) -> None:
    """The next worker does the work again; what was remembered before the push may be replaced."""
    remembered: list[str] = []

    async def remember(commit: str) -> None:
        assert BRANCH not in heads(bench.origin), "before the push"
        remembered.append(commit)

    lost = commit_file(bench.clone, "a.txt", "once")
    await publish(
        bench.mirror, bench.bundle(), bench.base, BRANCH,
        run_id="run-1", base_branch="main", before_push=remember,
    )  # fmt: skip
    assert (remembered, heads(bench.origin)[BRANCH]) == ([lost], lost)
    run_git(bench.clone, "reset", "--quiet", "--hard", str(bench.base))
    again = commit_file(bench.clone, "a.txt", "again")
    with pytest.raises(PublishError, match="not overwritten"):
        await bench.publish()
    await publish(
        bench.mirror, bench.bundle(), bench.base, BRANCH,
        run_id="run-1", base_branch="main", pushed=remembered,
    )  # fmt: skip
    assert heads(bench.origin)[BRANCH] == again


async def test_a_worker_that_lost_its_run_pushes_nothing(bench: Bench) -> None:
    async def refuse(commit: str) -> None:
        raise LeaseLostError

    commit_file(bench.clone, "a.txt", "a")
    with pytest.raises(LeaseLostError):
        await publish(
            bench.mirror, bench.bundle(), bench.base, BRANCH,
            run_id="run-1", base_branch="main", before_push=refuse,
        )  # fmt: skip
    assert BRANCH not in heads(bench.origin)


@pytest.mark.parametrize("known", [False, True])
async def test_commits_of_others_are_not_overwritten(bench: Bench, known: bool) -> None:
    first = commit_file(bench.clone, "a.txt", "a")
    await bench.publish()
    run_git(
        bench.folder, "clone", "--quiet", "--branch", BRANCH, str(bench.origin), str(bench.folder / "person")
    )
    theirs = commit_file(bench.folder / "person", "p.txt", "p")
    run_git(bench.folder / "person", "push", "--quiet", "origin", BRANCH)
    if known:
        await bench.mirror.ensure()
    commit_file(bench.clone, "b.txt", "b")
    with pytest.raises(PublishError, match="did not publish"):
        await bench.publish(previous=first)
    assert heads(bench.origin)[BRANCH] == theirs


@pytest.mark.parametrize(
    "branch",
    [
        "main",
        "taskyard/",
        "refs/heads/taskyard/x",
        "taskyard/../main",
        "taskyard/x.lock",
        "taskyard/a b",
        "taskyard/-x",
        "taskyard/x:main",
        "taskyard/x\n",
        "Taskyard/x",
        "+taskyard/x",
    ],
)
async def test_branch_names_that_are_refused(bench: Bench, branch: str) -> None:
    commit_file(bench.clone, "a.txt", "a")
    with pytest.raises(PublishError, match="not a branch of a run"):
        await bench.publish(branch=branch)
    assert list(heads(bench.origin)) == ["main"]


async def test_base_branch_is_never_written(bench: Bench) -> None:
    commit_file(bench.clone, "a.txt", "a")
    with pytest.raises(PublishError, match="base branch"):
        await publish(bench.mirror, bench.bundle(), bench.base, BRANCH, run_id="run-1", base_branch=BRANCH)


async def test_bundles_that_are_not_one_head(bench: Bench) -> None:
    commit_file(bench.clone, "a.txt", "a")
    run_git(bench.clone, "branch", "other")
    run_git(bench.clone, "tag", "--annotate", "--message", "t", "tag")
    before = bench.objects()
    garbage = bench.folder / "garbage"
    garbage.write_bytes(b"# v2 git bundle\n\nPACK nonsense")
    whole = bench.bundle().read_bytes()
    cut = bench.folder / "cut"
    cut.write_bytes(whole[:-30])
    flipped = bench.folder / "flipped"
    flipped.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    tagged = bench.folder / "tagged"
    run_git(bench.clone, "bundle", "create", "--quiet", str(tagged), "tag", f"^{bench.base}")
    renamed = bench.folder / "renamed"
    renamed.write_bytes(tagged.read_bytes().replace(b" refs/tags/tag\n", b" HEAD\n", 1))
    (bench.folder / "empty").touch()
    refused = [garbage, cut, flipped, tagged, renamed, bench.folder / "empty"]
    for path in [*refused, bench.bundle("HEAD", "other", f"^{bench.base}")]:
        with pytest.raises(PublishError, match="was refused"):
            await bench.publish(path)
    assert list(heads(bench.origin)) == ["main"]
    assert bench.refs() == "refs/heads/main"
    assert bench.objects() - before <= {run_git(bench.clone, "rev-parse", "tag")} | set(
        _reachable(bench.clone)
    )


def _reachable(repository: Path) -> list[str]:
    return [line.split()[0] for line in run_git(repository, "rev-list", "--objects", "--all").splitlines()]


async def test_too_large_a_bundle(bench: Bench) -> None:
    commit_file(bench.clone, "a.txt", "a")
    with pytest.raises(PublishError, match="more than the limit"):
        await publish(
            bench.mirror, bench.bundle(), bench.base, BRANCH, run_id="r", base_branch="main", max_bytes=100
        )


def _plant(clone: Path, entry: bytes, content: bytes = b"x") -> str:
    """Commit a tree with an entry that git itself would not make; the commit id."""
    blob = run_git(clone, "hash-object", "-w", "--stdin", data=content)
    raw = b"100644 " + entry + b"\0" + bytes.fromhex(blob)
    tree = run_git(clone, "hash-object", "-w", "-t", "tree", "--literally", "--stdin", data=raw)
    commit = run_git(clone, "commit-tree", tree, "-p", "HEAD", "-m", "x")
    run_git(clone, "update-ref", "HEAD", commit)
    return commit


@pytest.mark.parametrize(
    ("entry", "content"),
    [
        (b".git", b"x"),
        (b"..", b"x"),
        (b".GIT", b"x"),
        (b".gitmodules", b'[submodule "a"]\n\tpath = a\n\turl = --upload-pack=x\n'),
    ],
)
async def test_hostile_objects_do_not_enter_the_mirror(bench: Bench, entry: bytes, content: bytes) -> None:
    commit = _plant(bench.clone, entry, content)
    with pytest.raises(PublishError, match=r"was refused: git fetch failed: (?s:.*)(fsck|object)"):
        await bench.publish()
    assert commit not in bench.objects()
    assert list(heads(bench.origin)) == ["main"]


async def test_missing_objects_are_noticed(bench: Bench) -> None:
    commit_file(bench.clone, "b.txt", "b")
    blob = run_git(bench.clone, "hash-object", "-w", "--stdin", data=b"will be missing")
    tree = run_git(bench.clone, "mktree", data=f"100644 blob {blob}\tgone\n".encode())
    commit = run_git(bench.clone, "commit-tree", tree, "-p", "HEAD", "-m", "x")
    run_git(bench.clone, "update-ref", "HEAD", commit)
    head = f"# v2 git bundle\n-{bench.base} \n{commit} HEAD\n\n".encode()
    listed = run_git(bench.clone, "rev-list", "--objects", commit, f"^{bench.base}").split()
    wanted = "\n".join(name for name in listed if len(name) == 40 and name != blob)
    run_git(bench.clone, "pack-objects", "--quiet", str(bench.folder / "p"), data=wanted.encode())
    pack = next(bench.folder.glob("p-*.pack"))
    (bench.folder / "holed").write_bytes(head + pack.read_bytes())
    with pytest.raises(PublishError, match="was refused"):
        await bench.publish(bench.folder / "holed")
    assert commit not in bench.objects()


async def test_unrelated_history_is_refused(bench: Bench) -> None:
    run_git(bench.clone, "checkout", "--quiet", "--orphan", "fresh")
    commit_file(bench.clone, "a.txt", "a")
    with pytest.raises(PublishError, match="no commit in common"):
        await bench.publish(bench.bundle("HEAD"))
    assert list(heads(bench.origin)) == ["main"]
    assert bench.refs() == "refs/heads/main"


async def test_history_that_left_the_base_is_compared_where_it_parted(tmp_path: Path) -> None:
    tree = make_repository(tmp_path / "tree")
    first = run_git(tree, "rev-parse", "HEAD")
    commit_file(tree, "later.txt", "later\n")
    bench = await make_bench(tmp_path, tree)
    run_git(bench.clone, "reset", "--quiet", "--hard", first)
    commit_file(bench.clone, "a.txt", "a\n")
    published = await bench.publish()
    assert (published.diff_base, published.commits, published.stats) == (first, 1, DiffStat(1, 1, 0))


async def test_base_that_the_origin_has_rewritten_meanwhile(bench: Bench) -> None:
    tip = commit_file(bench.clone, "a.txt", "a")
    bundled = bench.bundle()
    run_git(bench.clone, "checkout", "--quiet", "--orphan", "fresh")
    commit_file(bench.clone, "b.txt", "b")
    run_git(bench.clone, "push", "--quiet", "--force", "origin", "HEAD:main")
    await bench.mirror.ensure()
    await bench.publish(bundled)
    assert heads(bench.origin)[BRANCH] == tip


async def test_into_an_empty_origin(tmp_path: Path) -> None:
    empty = tmp_path / "empty.git"
    empty.mkdir()
    run_git(empty, "init", "--quiet", "--bare", "--initial-branch=main")
    bench = await make_bench(tmp_path, empty)
    assert bench.base is None
    tip = commit_file(bench.clone, "a.txt", "a\nb\n")
    assert await bench.publish() == Published(BRANCH, tip, 1, DiffStat(1, 2, 0), None)
    assert "+a" in await diff(bench.mirror, None, tip)


async def test_origin_that_is_gone(bench: Bench) -> None:
    commit_file(bench.clone, "a.txt", "a")
    bench.origin.rename(bench.folder / "elsewhere")
    with pytest.raises(GitError, match="does not appear to be a git repository"):
        await bench.publish()
    assert bench.refs() == "refs/heads/main"


async def test_diff_for_showing(bench: Bench) -> None:
    (bench.clone / "binary").write_bytes(b"\0\1" * 100)
    run_git(bench.clone, "mv", "README.md", "LIESMICH.md")
    (bench.clone / "latin").write_bytes("grün\n".encode("latin-1"))
    tip = commit_file(bench.clone, "long.txt", "line\n" * 1000)
    await bench.publish()
    text = await diff(bench.mirror, bench.base, tip)
    assert "rename from README.md\nrename to LIESMICH.md" in text
    assert "Binary files /dev/null and b/binary differ" in text
    assert "+gr\N{REPLACEMENT CHARACTER}n" in text
    assert text.count("\n+line") == 1000
    short = await diff(bench.mirror, bench.base, tip, 1000)
    assert short.endswith("… the diff is longer than 1000 bytes and was cut here\n")
    assert len(short) < 1100
    assert await diff_stat(bench.mirror, bench.base, tip) == DiffStat(4, 1001, 0)


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    settings = Settings(_env_file=None, data_dir=tmp_path / "data")
    provider = BubblewrapProvider(settings)
    missing = [
        f"{problem.name}: {problem.detail}"
        for problem in await provider.check()
        if problem.fatal and not problem.ok
    ]
    if missing:
        pytest.skip(f"this machine cannot make sandboxes: {missing}")
    sandbox = await provider.create(Spec("run-1", Limits(cpus=2, memory_mb=1024, pids=256, tmp_mb=64)))
    yield sandbox
    await sandbox.destroy()


async def _act(sandbox: Sandbox, workspace: Workspace, script: str) -> None:
    process = await sandbox.exec(["/bin/sh", "-ec", script], cwd=workspace.path)
    await process.stdout.read()
    done = await process.wait()
    await process.kill()
    assert done.code == 0, done.stderr_tail


async def test_planted_configuration_never_runs_on_the_host(tmp_path: Path, sandbox: Sandbox) -> None:
    """Attack test 13: everything in git that runs programs is planted, then the run is published."""
    origin = make_bare(tmp_path / "origin.git", make_repository(tmp_path / "tree"))
    mirror = Mirror.of(tmp_path / "data", check_origin(str(origin)))
    workspace = await prepare(sandbox, mirror, None, "acme/shop")
    before = _ownership(mirror.path)
    marker = tmp_path / "marker"
    await _act(
        sandbox,
        workspace,
        f"""
        printf '#!/bin/sh\\ntouch {marker} /tmp/workspace/ran 2>/dev/null\\ncat\\n' > .git/evil; chmod +x .git/evil
        evil=$PWD/.git/evil
        printf '[core]\\n\\tfsmonitor = %s\\n\\tpager = %s\\n\\tsshCommand = %s\\n' $evil $evil $evil > .git/included
        git config core.fsmonitor $evil; git config diff.external $evil; git config core.alternateRefsCommand $evil
        git config filter.x.clean $evil; git config filter.x.smudge $evil; git config diff.x.textconv $evil
        git config include.path included; git config uploadpack.packObjectsHook $evil; git config gpg.program $evil
        git config protocol.ext.allow always
        mkdir -p .git/hooks
        for hook in pre-commit post-commit pre-push reference-transaction post-checkout pre-auto-gc; do
            cp .git/evil .git/hooks/$hook
        done
        echo '* filter=x diff=x' > .gitattributes
        printf '[submodule "s"]\\n\\tpath = s\\n\\turl = ext::sh -c "touch%% {marker}"\\n' > .gitmodules
        echo work > work.txt
        """,
    )
    await commit_leftovers(sandbox, workspace, "TY-7", "Work")
    await _act(sandbox, workspace, "test -e /tmp/workspace/ran")  # it is armed
    async with bundle(sandbox, workspace, folder=tmp_path) as path:
        assert path is not None
        published = await publish(mirror, path, workspace.base_commit, BRANCH, run_id="r", base_branch="main")
    text = await diff(mirror, published.diff_base, published.commit)
    await mirror.ensure()
    assert not marker.exists()
    assert "+work" in text
    assert run_git(origin, "show", f"{BRANCH}:work.txt") == "work"
    after = _ownership(mirror.path)
    assert {path: after[path] for path in before} == before


async def test_git_folder_replaced_by_a_link(tmp_path: Path, sandbox: Sandbox) -> None:
    """Attack test 14: nothing is made on the host, and the failure is told."""
    target = make_repository(tmp_path / "host")
    listing = sorted(target.rglob("*"))
    origin = make_bare(tmp_path / "origin.git", target)
    mirror = Mirror.of(tmp_path / "data", check_origin(str(origin)))
    workspace = await prepare(sandbox, mirror, None, "acme/shop")
    await _act(sandbox, workspace, f"mv .git g; ln -s /oldroot{target}/.git .git; echo x > x")
    with pytest.raises(PublishError, match="gone or damaged"):
        await commit_leftovers(sandbox, workspace, "TY-7", "Work")
    with pytest.raises(PublishError):
        async with bundle(sandbox, workspace, folder=tmp_path):
            pass
    assert sorted(target.rglob("*")) == listing
    assert list(heads(origin)) == ["main"]
    # A new clone in the same sandbox replaces the link, and does not follow it.
    await prepare(sandbox, mirror, None, "acme/shop")
    assert sorted(target.rglob("*")) == listing


def _ownership(repository: Path) -> dict[Path, tuple[int, int, int]]:
    found = {}
    for folder, _, files in os.walk(repository / "objects"):
        for name in files:
            status = (Path(folder) / name).stat()
            found[Path(folder) / name] = (status.st_uid, status.st_gid, status.st_nlink)
    return found
