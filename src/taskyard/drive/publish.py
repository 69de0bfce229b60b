"""Check what a run made and push it to the run's own branch of the origin.

A bundle comes from a sandbox and may hold anything. It is unpacked in a quarantine repository under
limits, and only the objects that its one head reaches are taken over, checked one by one
(`fetch.fsckObjects`); git does that for a fetch between repositories in every version, but for a bundle
only since 2.46.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from taskyard.drive.workspace import MAX_BUNDLE, PublishError
from taskyard.forge.git import GitError, Mirror, git

PREFIX = "taskyard/"
MAX_DIFF = 1024 * 1024
_MEMORY = 2 * 1024**3
"""Bytes for git while it unpacks a bundle: a small pack can describe very large objects."""
_CPU_S = 600
_LARGE = ("core.bigFileThreshold", "16m")
"""Larger files are streamed, not held in memory, and are binary to a diff."""
_FETCH = (
    "fetch",
    "--quiet",
    "--no-tags",
    "--no-write-fetch-head",
    "--no-auto-maintenance",
    "--end-of-options",
)
_EMPTY_TREE = {
    40: "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
    64: "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321",
}


@dataclass(frozen=True)
class DiffStat:
    files: int
    insertions: int
    deletions: int


@dataclass(frozen=True)
class Published:
    """What stands on the origin now."""

    branch: str
    commit: str
    commits: int
    """Number of commits that the base does not have."""
    stats: DiffStat
    """Against `diff_base`."""
    diff_base: str | None
    """What to compare with: the base commit, or, if the result does not descend from it because the agent
    rewrote or left that history, the commit where both part. None: everything is new."""


def branch_name(slug: str, run_id: str) -> str:
    """The branch of a run: `taskyard/<slug>-<first 8 of the run id>`, in lower case."""
    readable = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")[:100] or "task"
    return f"{PREFIX}{readable}-{run_id[:8].lower()}"


async def publish(
    mirror: Mirror,
    bundle_path: Path,
    base_commit: str | None,
    branch: str,
    *,
    run_id: str,
    base_branch: str,
    previous: str | None = None,
    pushed: Collection[str] = (),
    before_push: Callable[[str], Awaitable[None]] | None = None,
    max_bytes: int = MAX_BUNDLE,
) -> Published:
    """Check a bundle of `workspace.bundle` and push its head to `branch` of the origin, and nothing else.

    base_commit, base_branch: of the workspace. previous: the commit this run published before, if it did;
    pushed: others that it, or its agent, may have pushed there. before_push: told the commit; the place to remember
    it, and to find that this run is somebody else's by now. The bundle is left in place.

    The branch must be below `taskyard/` and is never the base branch. It may be new, stand at `previous` or one of
    `pushed`, or at a commit that the result contains (a publication whose answer was lost); anything else on it
    was pushed by somebody, and is not overwritten. Publishing the same result twice is harmless.

    The result has to share history with the base: a rebased or shortened history makes a sensible branch
    and is allowed (see `diff_base`), an unrelated one could not be compared or merged and is refused.
    With an empty origin any history is accepted.

    Raises PublishError for a result that is refused, GitError when the origin cannot be reached.
    """
    _check_branch(branch, base_branch)
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id) is None:
        raise PublishError("The run id cannot be part of a ref name.")
    size = (await asyncio.to_thread(bundle_path.stat)).st_size
    if size > max_bytes:
        raise PublishError(
            f"The result is {size / 2**20:.0f} MB, more than the limit of {max_bytes / 2**20:g} MB."
        )
    ref = f"refs/taskyard/runs/{run_id}"
    try:
        commit = await _take_over(mirror, bundle_path, base_commit, ref, max_bytes)
        diff_base = await _shared_history(mirror, base_commit, commit)
        counted = await mirror.git(
            "rev-list", "--count", commit, *([f"^{base_commit}"] if base_commit is not None else [])
        )
        stats = await diff_stat(mirror, diff_base, commit)
        if before_push is not None:
            await before_push(commit)
        await _push(mirror, commit, branch, {*pushed, previous})
        async with mirror.lock():
            await mirror.git("update-ref", f"refs/heads/{branch}", commit)
    finally:
        await _remove_ref(mirror, ref)
    return Published(branch, commit, int(counted), stats, diff_base)


async def diff(mirror: Mirror, base_commit: str | None, commit: str, max_bytes: int = MAX_DIFF) -> str:
    """The changes from base to commit as a unified diff, for showing. Cut at max_bytes, and says so.

    Text that is not UTF-8 is shown with replacement characters. base_commit None: everything is new.
    """
    output = await _diff(mirror, base_commit, commit, "--patch", max_bytes + 1)
    if len(output) <= max_bytes:
        return output.decode("utf-8", "replace")
    kept = output[:max_bytes].decode("utf-8", "replace").rpartition("\n")[0]
    return f"{kept}\n… the diff is longer than {max_bytes} bytes and was cut here\n"


async def diff_stat(mirror: Mirror, base_commit: str | None, commit: str) -> DiffStat:
    """Numbers of changed files and of added and deleted lines; binary files count as files only."""
    output = (await _diff(mirror, base_commit, commit, "--shortstat", 1000)).decode()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (file|insertion|deletion)", output)}
    return DiffStat(counts.get("file", 0), counts.get("insertion", 0), counts.get("deletion", 0))


async def _diff(mirror: Mirror, base_commit: str | None, commit: str, form: str, max_bytes: int) -> bytes:
    base = base_commit or _EMPTY_TREE[len(commit)]
    return await mirror.git(
        "diff-tree", "-r", form, "--no-ext-diff", "--no-textconv", "--no-color", "--find-renames", "-l1000",
        "--end-of-options", base, commit, "--",
        config=[_LARGE], wrapper=_limits(), max_output=max_bytes, truncate=True,
    )  # fmt: skip


def _limits(max_file: int | None = None) -> list[str]:
    """The command that bounds what git may use while it reads objects that an agent made."""
    size = [f"--fsize={max_file}"] if max_file is not None else []
    return ["prlimit", f"--data={_MEMORY}", f"--cpu={_CPU_S}", "--core=0", *size, "--"]


def _check_branch(branch: str, base_branch: str) -> None:
    name = branch.removeprefix(PREFIX)
    well_formed = re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,199}", name) is not None
    if not branch.startswith(PREFIX) or not well_formed or ".." in name or name.endswith((".", ".lock")):
        raise PublishError(f"'{branch}' is not a branch of a run: it has to be of the form {PREFIX}<name>.")
    if branch == base_branch:
        raise PublishError(f"'{branch}' is the base branch of the run and is not written.")


async def _take_over(
    mirror: Mirror, bundle_path: Path, base_commit: str | None, ref: str, max_bytes: int
) -> str:
    """Bring the one head of a bundle into the mirror as `ref`; its commit id."""
    limits = _limits(2 * max_bytes + 2**20)
    bundle = str(bundle_path)
    try:
        async with _quarantine(mirror, base_commit, bundle_path.parent) as quarantine:
            await git("bundle", "verify", "--quiet", bundle, git_dir=quarantine, wrapper=limits)
            listed = await git("bundle", "list-heads", bundle, git_dir=quarantine)
            match = re.fullmatch(rb"([0-9a-f]{40}|[0-9a-f]{64}) HEAD\n", listed)
            if match is None:
                raise PublishError("The result was refused: it has to have exactly one head, HEAD.")
            commit = match[1].decode()
            await git(
                *_FETCH, bundle, "HEAD:refs/heads/result",
                git_dir=quarantine, config=[("fetch.unpackLimit", "1"), _LARGE], wrapper=limits,
            )  # fmt: skip
            async with mirror.lock():
                await mirror.git(
                    *_FETCH, str(quarantine), f"+refs/heads/result:{ref}", config=[_LARGE], wrapper=limits
                )
        taken = (await mirror.git("rev-parse", "--verify", f"{ref}^{{commit}}")).decode().strip()
    except GitError as error:
        raise PublishError(f"The result was refused: {error.detail}") from error
    if taken != commit:
        raise PublishError("The result was refused: its head is not a commit.")
    return commit


@contextlib.asynccontextmanager
async def _quarantine(mirror: Mirror, base_commit: str | None, folder: Path) -> AsyncIterator[Path]:
    """An empty bare repository in `folder` that sees the mirror's objects; removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="quarantine-", dir=folder) as name:
        path = Path(name)
        format_ = (await mirror.git("rev-parse", "--show-object-format")).decode().strip()
        await git("init", "--quiet", "--bare", "--template=", f"--object-format={format_}", name)
        info = path / "objects" / "info"
        info.mkdir(exist_ok=True)
        (info / "alternates").write_text(f"{mirror.path / 'objects'}\n", "utf-8")
        if base_commit is not None:
            # Older versions of git want what a bundle builds on to be reachable from a ref; the origin may
            # have rewritten the base branch meanwhile.
            await git("update-ref", "refs/heads/base", base_commit, git_dir=path)
        yield path


async def _shared_history(mirror: Mirror, base_commit: str | None, commit: str) -> str | None:
    """The commit where base and result part (the base, normally); PublishError if there is none."""
    if base_commit is None:
        return None
    try:
        found = await mirror.git("merge-base", base_commit, commit)
    except GitError as error:
        if error.returncode == 1:
            raise PublishError(
                "The result was refused: its history has no commit in common with the base it was made from."
            ) from None
        raise
    return found.decode().strip()


async def _is_ancestor(mirror: Mirror, ancestor: str, commit: str) -> bool:
    try:
        await mirror.git("merge-base", "--is-ancestor", ancestor, commit)
    except GitError as error:
        # 1: is not; 128: the ancestor is not here, so nothing here descends from it.
        if error.returncode in {1, 128}:
            return False
        raise
    return True


async def _push(mirror: Mirror, commit: str, branch: str, ours: set[str | None]) -> None:
    current = await mirror.remote_head(branch)
    if current == commit:
        return
    if current is not None and current not in ours and not await _is_ancestor(mirror, current, commit):
        raise PublishError(
            f"Branch {branch} has commits that this run did not publish; they are not overwritten."
            " Rename or delete that branch, then publish again."
        )
    try:
        await mirror.push(commit, branch, expected=current)
    except GitError as error:
        if "checked out" in error.stderr:
            raise PublishError(
                f"Branch {branch} is checked out in {mirror.origin.display}, and git does not change a branch"
                " under somebody's feet. Check out another branch there, then publish again."
            ) from error
        raise PublishError(f"Pushing branch {branch} failed: {error.detail}") from error


async def _remove_ref(mirror: Mirror, ref: str) -> None:
    async with mirror.lock():
        with contextlib.suppress(GitError):  # a ref that is still there is overwritten next time
            await mirror.git("update-ref", "-d", ref)
