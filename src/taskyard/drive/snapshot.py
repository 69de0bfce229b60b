"""The state of a sandbox as files, and back: the workspace, and the agent's session.

All of it is made and unpacked by programs inside the sandbox: what the agent left is its word only, and the
server never looks into it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from taskyard.drive.inside import NOTHING, TooLargeError, TooSlowError, feed, output_file, run, said, script
from taskyard.drive.workspace import ADD, MIRROR_INSIDE, Workspace, bounded
from taskyard.errors import TaskyardError
from taskyard.forge.git import Mirror
from taskyard.sandbox.provider import Exit, Mount, Sandbox

TIMEOUT_S = 300.0
MAX_WORKSPACE = 1024 * 1024 * 1024
MAX_SESSION = 256 * 1024 * 1024

IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    # The date is fixed: the same tree on the same commit is the same snapshot.
    for what, value in (("NAME", "Taskyard"), ("EMAIL", "taskyard@localhost"), ("DATE", "@0 +0000"))
}


class SnapshotError(TaskyardError):
    """The state of a sandbox could not be kept, or brought back."""


@dataclass(frozen=True)
class Taken:
    """A part of the state, in a file that is there for the moment only."""

    path: Path
    hash: str


# $1 = path, $2 = ^base or empty, $3 = the newest snapshot that was kept. The uncommitted files become a commit
# on top of HEAD, by an index of its own: the agent's is not touched, it may be at work. Ignored files stay out.
# Its message lists the branches, since a bundle leaves those out whose commits are all in the base.
# The commit and the branch go to standard error, the bundle to standard output.
_TAKE = f"""
cd -- "$1" && dir=$(git rev-parse --absolute-git-dir) || exit
index=$(mktemp) && trap 'rm -f "$index" "$index.lock"' EXIT || exit
cp -- "$dir/index" "$index" 2>/dev/null || rm -f "$index"
export GIT_INDEX_FILE="$index"
{{ {ADD}; }} 2>/dev/null
head=$(git rev-parse --quiet --verify HEAD)
commit=$({{ printf 'checkpoint\\n\\nhead %s\\n' "$(git symbolic-ref --quiet HEAD)"
  git for-each-ref --format='branch %(objectname) %(refname)' refs/heads
}} | git commit-tree "$(git write-tree)" ${{head:+-p "$head"}}) || exit
[ "$commit" != "$3" ] || exit 3
git update-ref refs/taskyard/checkpoint "$commit" || exit
echo "checkpoint $commit $(git symbolic-ref --quiet HEAD)" >&2
git bundle create --quiet - --branches refs/taskyard/checkpoint $2 2>/dev/null
"""

# From the mirror, any commit that it has.
_FETCH = """
from_mirror() {
  git fetch --quiet --no-tags \
    --upload-pack="git -c safe.directory=$1 -c uploadpack.allowAnySHA1InWant=true upload-pack" "$1" "$2"
}
"""

# $1 = path, $2 = snapshot, $3 = branch ref or empty, $4 = base commit or empty, $5 = mirror.
_BRING = (
    _FETCH
    + """
cd -- "$1" || exit
bundle=$(mktemp -p "$HOME") && trap 'rm -f "$bundle"' EXIT && cat > "$bundle" || exit
if [ -n "$4" ] && ! git cat-file -e "$4" 2>/dev/null; then
  # The base branch was rewritten meanwhile.
  from_mirror "$5" "$4" || exit
fi
git fetch --quiet --no-tags --update-head-ok "$bundle" \
  '+refs/heads/*:refs/heads/*' '+refs/taskyard/checkpoint:refs/taskyard/checkpoint' || exit
[ "$(git rev-parse refs/taskyard/checkpoint)" = "$2" ] || { echo "the snapshot is another one" >&2; exit 1; }
head=$(git rev-parse --quiet --verify "$2^")
branches=$(git log -1 --format=%B "$2" | sed -n 's/^branch //p')
git update-ref --no-deref HEAD "$2" || exit
git for-each-ref --format='delete %(refname)' refs/heads | git update-ref --stdin || exit
printf '%s\n' "$branches" | while read -r commit ref; do
  [ -z "$ref" ] || git update-ref "$ref" "$commit" || exit
done || exit
if [ -n "$3" ]; then git symbolic-ref HEAD "$3"; else git update-ref --no-deref HEAD "$head"; fi || exit
git read-tree --reset -u "$2" || exit
if [ -n "$head" ]; then git reset --quiet --mixed "$head"; else git read-tree --empty; fi
"""
)


@contextlib.asynccontextmanager
async def taken_workspace(
    sandbox: Sandbox, workspace: Workspace, newest: str
) -> AsyncIterator[tuple[Taken, str] | None]:
    """The repository in the workspace as a git bundle: all branches, and the uncommitted files.

    Gives it with the ref that HEAD names ("": none); its hash is the snapshot's commit. None when that is
    `newest`, so nothing has changed. Raises SnapshotError.
    """
    excluded = f"^{workspace.base_commit}" if workspace.base_commit is not None else ""
    argv = script(_TAKE, workspace.path, excluded, newest)
    async with _spooled(sandbox, argv, MAX_WORKSPACE, bounded(workspace, dict(IDENTITY))) as (path, exit_):
        if exit_.code == NOTHING:
            yield None
            return
        words = next(
            (line.split(" ") for line in exit_.stderr_tail.splitlines() if line.startswith("checkpoint ")), []
        )
        if exit_.code != 0 or len(words) != 3:
            raise SnapshotError(f"The workspace could not be kept: {said(exit_)}")
        yield Taken(path, words[1]), words[2]


async def bring_workspace(
    sandbox: Sandbox,
    workspace: Workspace,
    snapshot: str,
    head: str,
    content: AsyncIterator[bytes],
    mirror: Mirror,
) -> None:
    """Bring a fresh clone to a snapshot. Raises SnapshotError."""
    argv = script(_BRING, workspace.path, snapshot, head, workspace.base_commit or "", MIRROR_INSIDE)
    code, reason = await feed(
        sandbox, argv, content, timeout=TIMEOUT_S, mounts=(Mount(mirror.path, MIRROR_INSIDE),)
    )
    if code != 0:
        raise SnapshotError(f"The workspace could not be brought back: {reason}")


# $1 = path, $2 = commit, $3 = mirror, $4 = "fresh" for a clone in which nobody worked: it may be left behind.
# Exit status NOTHING: HEAD is the commit, or is not one of those that it builds on.
# What changed from HEAD to it is as it is there, whatever the files were like; all others stay.
_FORWARD = (
    _FETCH
    + f"""
cd -- "$1" && from_mirror "$3" "$2" || exit
head=$(git rev-parse --quiet --verify HEAD)
[ "$head" != "$2" ] || exit {NOTHING}
[ "$4" = fresh ] || [ -z "$head" ] || git merge-base --is-ancestor "$head" "$2" || exit {NOTHING}
git read-tree --reset -u ${{head:+"$head"}} "$2" && git update-ref HEAD "$2"
"""
)


async def bring_forward(
    sandbox: Sandbox, workspace: Workspace, commit: str, mirror: Mirror, *, fresh: bool = False
) -> bool:
    """Bring a workspace to a commit that builds on its HEAD; False when that does not, or is it. Raises SnapshotError.

    fresh: nobody worked in it, so what its HEAD is does not matter.
    """
    argv = script(_FORWARD, workspace.path, commit, MIRROR_INSIDE, "fresh" if fresh else "")
    code, _, reason = await run(
        sandbox, argv, timeout=TIMEOUT_S, env=bounded(workspace), mounts=(Mount(mirror.path, MIRROR_INSIDE),)
    )
    if code not in {0, NOTHING}:
        raise SnapshotError(f"The workspace could not be brought to what was published: {reason}")
    return code == 0


# $1 = folder, then what of it to keep.
_PACK = """
cd -- "$1" 2>/dev/null || exit 3
shift
for one; do shift; [ ! -e "$one" ] || set -- "$@" "$one"; done
[ $# -gt 0 ] || exit 3
{ tar -c --sort=name -- "$@" 2>/dev/null || [ $? -eq 1 ]; } | gzip -n -1
"""
_UNPACK = 'mkdir -p -- "$1" && cd -- "$1" && gzip -d | tar -x --no-same-owner'


@contextlib.asynccontextmanager
async def taken_files(
    sandbox: Sandbox, folder: str, names: Sequence[str], newest: str, max_bytes: int
) -> AsyncIterator[Taken | None]:
    """Files below a folder as an archive; None when it is the `newest`, or there are none. Raises SnapshotError."""
    async with _spooled(sandbox, script(_PACK, folder, *names), max_bytes, {}) as (path, exit_):
        if exit_.code == NOTHING:
            yield None
            return
        if exit_.code != 0:
            raise SnapshotError(f"Files of the agent could not be kept: {said(exit_)}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        yield None if digest == newest else Taken(path, digest)


async def bring_files(sandbox: Sandbox, folder: str, content: AsyncIterator[bytes]) -> None:
    """Unpack an archive of `taken_files` in a folder. Raises SnapshotError."""
    code, reason = await feed(sandbox, script(_UNPACK, folder), content, timeout=TIMEOUT_S)
    if code != 0:
        raise SnapshotError(f"Files of the agent could not be brought back: {reason}")


@contextlib.asynccontextmanager
async def _spooled(
    sandbox: Sandbox, argv: list[str], max_bytes: int, env: dict[str, str]
) -> AsyncIterator[tuple[Path, Exit]]:
    try:
        async with output_file(
            sandbox, argv, env=env, timeout=TIMEOUT_S, max_bytes=max_bytes, suffix=".checkpoint"
        ) as (path, exit_, _):
            yield path, exit_
    except (TooLargeError, TooSlowError) as error:
        raise SnapshotError(f"The state of the run could not be kept: {error.detail}") from None
