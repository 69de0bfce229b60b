"""The repository inside a sandbox: cloned in, leftovers committed, commits carried out as a bundle.

git runs inside the sandbox only. From the first turn on, everything there is the agent's: git's
configuration, its hooks, `.git` itself. What comes out is bytes to be checked (see publish.py), never a
path to be opened.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from taskyard.drive.inside import NOTHING, TooLargeError, TooSlowError, output_file, run, said, script
from taskyard.errors import TaskyardError
from taskyard.forge.git import BranchNotFoundError, GitError, Mirror
from taskyard.sandbox.provider import Mount, Sandbox

MIRROR_INSIDE = "/run/taskyard/mirror.git"
TIMEOUT_S = 300.0
"""For each step (run-lifecycle §1.2 steps 6 and 7)."""
MAX_BUNDLE = 1024 * 1024 * 1024
IDENTITY = ("Taskyard", "taskyard@localhost")
"""Name and e-mail of commits that the server makes."""


class WorkspaceError(TaskyardError):
    """The workspace could not be prepared."""

    code = "workspace_failed"


class PublishError(TaskyardError):
    """The work of the run could not be taken out of its workspace and published."""

    code = "publish_failed"


@dataclass(frozen=True)
class Workspace:
    """A clone inside a sandbox and what it was made from."""

    path: str
    """Absolute path inside the sandbox."""
    base_branch: str
    base_commit: str | None
    """Full commit id; None if the repository had no commits."""


@dataclass(frozen=True)
class Leftovers:
    """What `commit_leftovers` did."""

    committed: bool
    note: str | None = None
    """Something a person should know about the result, in one sentence or two."""


# $1 = path, $2 = mirror, then options. The mirror belongs to another user; git hands no configuration to
# the far side of a clone, so that side is named with it.
_CLONE = """
rm -rf -- "$1" && mkdir -p -- "$(dirname -- "$1")" || exit
path=$1 mirror=$2; shift 2
exec git clone --quiet --no-local --no-checkout --template= "$@" \
  --upload-pack="git -c safe.directory=$mirror upload-pack" -- "$mirror" "$path"
"""

# $1 = branch, $2 = commit or empty, $3 = URL shown for origin, $4 = name, $5 = e-mail
_CHECKOUT = """
git remote set-url origin "$3" && git config user.name "$4" && git config user.email "$5" || exit
if [ -z "$2" ]; then exec git symbolic-ref HEAD "refs/heads/$1"; fi
exec git reset --quiet --hard "$2"
"""


async def prepare(
    sandbox: Sandbox,
    mirror: Mirror,
    base: str | None,
    repository: str,
    *,
    user_name: str = IDENTITY[0],
    user_email: str = IDENTITY[1],
    timeout: float = TIMEOUT_S,
) -> Workspace:
    """Update the mirror and clone one branch of it into the sandbox, before the agent starts.

    base: a branch name, or None for the default branch. repository: `org/repo`; names the folder
    `repos/{org}/{repo}` of the sandbox's workspace in lower case (run-lifecycle §3.2). An existing folder
    is replaced. timeout: seconds for each of the two steps inside.

    The clone has the whole history of that one branch and the tags on it: `git blame` and version numbers
    made from tags work, and other branches would only be weight. It is made by git's own protocol and not
    by copying files, so it shares nothing with the mirror and gets nothing that the branch does not reach.
    `origin` names the public URL, or for a local origin just the repository; there are no credentials.

    Raises WorkspaceError: "Failed to clone repository …", "Failed to checkout branch …".
    """
    path = f"{sandbox.workspace}/repos/{_folder(repository)}"
    try:
        await mirror.ensure()
        branch, commit = await mirror.resolve(base)
    except BranchNotFoundError as error:
        raise WorkspaceError(f"Failed to checkout branch {base or '(default)'}: {error.detail}") from error
    except GitError as error:
        raise WorkspaceError(f"Failed to clone repository {repository}: {error.detail}") from error

    options = ["--single-branch", f"--branch={branch}"] if commit is not None else []
    mount = Mount(mirror.path, MIRROR_INSIDE)
    code, _, reason = await run(
        sandbox, script(_CLONE, path, MIRROR_INSIDE, *options), mounts=(mount,), timeout=timeout
    )
    if code != 0:
        raise WorkspaceError(f"Failed to clone repository {repository}: {reason}")

    url = mirror.origin.display if mirror.origin.kind == "url" else repository
    checkout = script(_CHECKOUT, branch, commit or "", url, user_name, user_email)
    code, _, reason = await run(sandbox, checkout, cwd=path, timeout=timeout)
    if code != 0:
        raise WorkspaceError(f"Failed to checkout branch {branch}: {reason}")
    return Workspace(path, branch, commit)


# $1 = path. The agent is gone, so whoever made these locks is gone too.
_UNLOCK = """
gone() { echo "the repository in the workspace is gone or damaged" >&2; exit 128; }
cd -- "$1" && dir=$(git rev-parse --absolute-git-dir) || gone
common=$(git rev-parse --path-format=absolute --git-common-dir) || gone
rm -f -- "$dir/index.lock" "$dir/HEAD.lock" "$common/packed-refs.lock" "$common/config.lock"
find "$common/refs" -name '*.lock' -type f -delete 2>/dev/null
"""

# A repository inside the repository would enter as a link to a commit that nobody else has, and an empty
# one would make `git add` fail altogether.
ADD = """
{ printf '.\\0'
  find . -mindepth 2 -name .git -prune -print0 | sed -z 's,/\\.git$,,; s,^\\./,:(exclude\\,top\\,literal),'
} | git add --all --ignore-errors --pathspec-from-file=- --pathspec-file-nul"""

# $1 = path, $2 = message. Prints notes, one a line; exit status NOTHING: there was nothing to commit.
_COMMIT = f"""{_UNLOCK}
if [ -d "$dir/rebase-merge" ] || [ -d "$dir/rebase-apply" ]; then
  if git rebase --abort >/dev/null 2>&1; then echo rebase-aborted; else echo rebase; fi
fi
for state in MERGE CHERRY_PICK REVERT; do
  if [ -f "$dir/${{state}}_HEAD" ]; then echo "$state"; fi
done

{ADD} || echo unreadable

head=$(git rev-parse --quiet --verify HEAD)
if [ ! -f "$dir/MERGE_HEAD" ]; then
  if [ -n "$head" ]; then
    [ "$(git write-tree)" != "$(git rev-parse "$head^{{tree}}")" ] || exit 3
  else
    [ -n "$(git ls-files | head -c 1)" ] || exit 3
  fi
fi
git commit --quiet --no-verify --cleanup=whitespace --message="$2" >&2
"""

_NOTES = {
    "rebase-aborted": "A rebase was still in progress; it was aborted, so the commits from before it are published.",
    "rebase": "A rebase or series of patches was still in progress; its current state is published.",
    "MERGE": "A merge was still in progress; files may contain conflict markers.",
    "CHERRY_PICK": "A cherry-pick was still in progress; files may contain conflict markers.",
    "REVERT": "A revert was still in progress; files may contain conflict markers.",
    "unreadable": "Some files could not be read and are missing from the commit.",
}


async def unlock(sandbox: Sandbox, workspace: Workspace, *, timeout: float = TIMEOUT_S) -> None:
    """Remove the locks of git processes that were killed. Raises WorkspaceError when the repository is gone."""
    code, _, reason = await run(
        sandbox, script(_UNLOCK + "exit 0", workspace.path), env=bounded(workspace), timeout=timeout
    )
    if code != 0:
        raise WorkspaceError(f"The workspace cannot be used again: {reason}")


async def commit_leftovers(
    sandbox: Sandbox, workspace: Workspace, slug: str, title: str, *, timeout: float = TIMEOUT_S
) -> Leftovers:
    """Commit on the current HEAD what the agent left uncommitted, as IDENTITY, after the agent has ended.

    Ignored files and repositories inside the repository stay out. The message is the title and
    `Task: <slug>`. Works on whatever branch or detached HEAD the agent left, and clears stale locks. An
    unfinished rebase is aborted, because the branch it started from still has all commits; an unfinished
    merge, cherry-pick or revert is committed as it is. Both are told in the note.

    Raises PublishError when there is no usable repository any more.
    """
    title = " ".join(title.replace("\0", " ").split())
    message = f"{title}\n\nTask: {slug}\n" if title else f"Task: {slug}\n"
    name, email = IDENTITY
    env = {
        "GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": email, "GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": email,
    }  # fmt: skip
    code, output, reason = await run(
        sandbox, script(_COMMIT, workspace.path, message), env=bounded(workspace, env), timeout=timeout
    )
    if code not in {0, NOTHING}:
        raise PublishError(f"The agent's changes could not be committed: {reason}")
    notes = [_NOTES[line] for line in output.decode("utf-8", "replace").splitlines() if line in _NOTES]
    return Leftovers(committed=code == 0, note=" ".join(dict.fromkeys(notes)) or None)


# $1 = path, $2 = ^base or empty. The bundle goes to standard output.
_BUNDLE = """
cd -- "$1" && git rev-parse --git-dir >/dev/null || exit
git rev-parse --quiet --verify HEAD >/dev/null || exit 3
new=$(git rev-list --max-count=1 HEAD $2) || exit 128
[ -n "$new" ] || exit 3
exec git bundle create --quiet - HEAD $2
"""


@contextlib.asynccontextmanager
async def bundle(
    sandbox: Sandbox,
    workspace: Workspace,
    max_bytes: int = MAX_BUNDLE,
    *,
    folder: Path | None = None,
    timeout: float = TIMEOUT_S,
) -> AsyncIterator[Path | None]:
    """Carry the commits of HEAD that are not in the base out of the sandbox, as a git bundle.

    Gives a file in `folder` (default: the sandbox's `scratch`), removed afterwards; None when HEAD has no commit
    that the base does not have. The content is the agent's word only: hand it to
    `publish`. Raises PublishError if it fails or is larger than max_bytes.
    """
    excluded = f"^{workspace.base_commit}" if workspace.base_commit is not None else ""
    try:
        async with output_file(
            sandbox, script(_BUNDLE, workspace.path, excluded),
            env=bounded(workspace), timeout=timeout, max_bytes=max_bytes, folder=folder, suffix=".bundle",
        ) as (path, exit_, size):  # fmt: skip
            if exit_.code == NOTHING and size == 0:
                yield None
                return
            if exit_.code != 0:
                raise PublishError(f"The commits of the run could not be bundled: {said(exit_)}")
            yield path
    except TooLargeError:
        raise PublishError(
            f"The commits of the run are larger than the limit of {max_bytes / 2**20:g} MB."
            " Large files probably were committed by mistake."
        ) from None
    except TooSlowError as error:
        raise PublishError(f"Bundling the commits of the run took {error.detail}.") from None


def _folder(repository: str) -> str:
    parts = repository.lower().split("/")
    if len(parts) != 2 or not all(
        re.fullmatch(r"[a-z0-9._-]+", part) and part not in {".", "..", ".git"} for part in parts
    ):
        raise WorkspaceError(
            f"Failed to clone repository {repository}: its name is not of the form org/repo."
        )
    return "/".join(parts)


def bounded(workspace: Workspace, env: dict[str, str] | None = None) -> dict[str, str]:
    """Environment in which git looks for its repository in the workspace only, not above it."""
    return {"GIT_CEILING_DIRECTORIES": workspace.path.rpartition("/")[0], **(env or {})}
