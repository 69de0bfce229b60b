"""The mirror of an origin: a bare repository on the host that runs are cloned from and published through.

A mirror is a cache. It can be deleted when no run uses it; the next run makes it again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from taskyard.forge.command import CONFIG, ENVIRONMENT, MAX_OUTPUT, GitError, config_environment, git, masked
from taskyard.forge.origin import InvalidOriginError, Origin, check_origin

__all__ = [
    "CONFIG", "ENVIRONMENT", "BranchNotFoundError", "Credentials", "GitError", "InvalidOriginError", "Mirror",
    "Origin", "check_origin", "config_environment", "git", "masked",
]  # fmt: skip

Credentials = Callable[[Origin], Awaitable[str | None]]
"""Gives the token for an origin, or None. Asked each time git connects, so a token may be short-lived."""

CREATE_TIMEOUT_S = 3600.0
"""For the first copy of a repository; large ones take long, and only once."""
CONNECT_TIMEOUT_S = 300.0
"""For each later exchange with an origin (run-lifecycle §1.2 step 6)."""
_STALE_LOCK_S = 10.0
"""git ends with the server that holds the mirror's lock (see command.py); it is given a moment to do so."""
_POLL_S = 0.05


class BranchNotFoundError(GitError):
    """The repository has no such branch."""

    code = "branch_not_found"


class Mirror:
    """The bare mirror of one origin.

    path: its folder; made by `ensure`. Several processes may use one mirror at the same time.
    """

    def __init__(self, path: Path, origin: Origin, credentials: Credentials | None = None) -> None:
        self.path = path
        self.origin = origin
        self._credentials = credentials

    @classmethod
    def of(cls, data_dir: Path, origin: Origin, credentials: Credentials | None = None) -> Mirror:
        """The mirror at its place in the data folder."""
        name = hashlib.sha256(origin.location.encode()).hexdigest()
        return cls(data_dir / "mirrors" / f"{name}.git", origin, credentials)

    async def git(self, *args: str, **options: Any) -> bytes:
        """Run git in the mirror; options as of `taskyard.forge.git.git`."""
        return await git(*args, git_dir=self.path, **options)

    async def ensure(self) -> None:
        """Make the mirror, or bring its branches, tags and default branch up to date with the origin.

        Raises GitError when the origin cannot be reached or refuses.
        """
        async with self.lock():
            if not (self.path / "HEAD").is_file():
                await self._create()
                return
            await asyncio.to_thread(self._remove_stale_locks)
            await self._connect(
                "fetch", "--quiet", "--prune", "--no-write-fetch-head", "--update-shallow", "--end-of-options",
                self.origin.location, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*",
                service="upload-pack",
            )  # fmt: skip
            await self._follow_head()

    async def resolve(self, branch: str | None = None) -> tuple[str, str | None]:
        """Name and commit of a branch of the mirror; None means the default branch.

        The commit is None when the repository has no commits yet: the name is then that of the branch
        which the first commit should make. Raises BranchNotFoundError.
        """
        listed = await self.git("for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", "refs/heads")
        heads = dict(line.split(" ", 1) for line in listed.decode("utf-8", "surrogateescape").splitlines())
        if branch is not None:
            if branch in heads:
                return branch, heads[branch]
            if heads or not await self._valid_branch(branch):
                raise BranchNotFoundError(f"{self.origin.display} has no branch '{branch}'.")
            return branch, None
        default = await self._default_branch()
        if not heads:
            return default or "main", None
        only = next(iter(heads)) if len(heads) == 1 else None
        for name in (default, only, "main", "master"):
            if name is not None and name in heads:
                return name, heads[name]
        raise BranchNotFoundError(
            f"{self.origin.display} has no default branch (its HEAD names none). Name the branch to work from."
        )

    async def remote_head(self, branch: str) -> str | None:
        """The commit at which a branch of the origin stands right now, or None."""
        ref = f"refs/heads/{branch}"
        listed = await self._connect(
            "ls-remote", "--end-of-options", self.origin.location, ref, service="upload-pack"
        )
        # ls-remote matches the ends of names as well: x/refs/heads/b.
        for line in listed.decode("utf-8", "replace").splitlines():
            commit, _, name = line.partition("\t")
            if name == ref:
                return commit
        return None

    async def push(self, commit: str, branch: str, *, expected: str | None) -> None:
        """Make `branch` of the origin stand at `commit`, if it stands at `expected` now (None: is not there).

        Nothing else is pushed. Raises GitError.
        """
        ref = f"refs/heads/{branch}"
        await self._connect(
            "push", "--quiet", "--no-follow-tags", "--recurse-submodules=no",
            f"--force-with-lease={ref}:{expected or ''}", "--end-of-options", self.origin.location, f"{commit}:{ref}",
            service="receive-pack",
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def lock(self, timeout: float = CREATE_TIMEOUT_S) -> AsyncIterator[None]:
        """Exclusive use of the mirror's refs, across tasks and processes. Ends with the process, too."""
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise GitError(
                            f"The mirror of {self.origin.display} is in use by another run for {timeout:g} seconds."
                        ) from None
                    await asyncio.sleep(_POLL_S)
            yield
        finally:
            os.close(descriptor)

    async def _create(self) -> None:
        # A clone, not init and fetch: it alone learns the branch name of an empty origin and its hash function.
        # Made aside and renamed, so that a mirror with a HEAD is a whole one.
        unfinished = self.path.with_suffix(".new")
        await asyncio.to_thread(shutil.rmtree, unfinished, ignore_errors=True)
        await self._connect(
            "clone", "--quiet", "--bare", "--no-local", "--template=",
            "--end-of-options", self.origin.location, str(unfinished),
            service="upload-pack", in_mirror=False, timeout=CREATE_TIMEOUT_S,
        )  # fmt: skip
        unfinished.rename(self.path)

    async def _follow_head(self) -> None:
        listed = await self._connect(
            "ls-remote", "--symref", "--end-of-options", self.origin.location, "HEAD", service="upload-pack"
        )
        for line in listed.decode("utf-8", "replace").splitlines():
            ref, _, name = line.removeprefix("ref: ").partition("\t")
            if line.startswith("ref: refs/heads/") and name == "HEAD":
                await self.git("symbolic-ref", "HEAD", ref)

    async def _default_branch(self) -> str | None:
        try:
            head = await self.git("symbolic-ref", "--quiet", "HEAD")
        except GitError as error:
            if error.returncode == 1:  # HEAD is a commit, as in the origin
                return None
            raise
        return head.decode("utf-8", "surrogateescape").strip().removeprefix("refs/heads/")

    async def _valid_branch(self, branch: str) -> bool:
        if branch.startswith("-") or "\0" in branch:
            return False
        try:
            await self.git("check-ref-format", f"refs/heads/{branch}")
        except GitError:
            return False
        return True

    async def _connect(
        self,
        command: str,
        *args: str,
        service: str,
        in_mirror: bool = True,
        timeout: float = CONNECT_TIMEOUT_S,
    ) -> bytes:
        """Run a git command that talks to the origin, with the token for it if there is one."""
        config: list[tuple[str, str]] = []
        secrets: list[str] = []
        token = await self._credentials(self.origin) if self._credentials is not None else None
        if token and self.origin.takes_credentials:
            basic = base64.b64encode(f"x-access-token:{token}".encode()).decode()
            secrets = [token, basic]
            config = [
                (f"http.{self.origin.location}.extraHeader", f"Authorization: Basic {basic}"),
                # git would repeat the header to whatever host a redirect names.
                ("http.followRedirects", "false"),
            ]
        far_side = self.origin.far_side("receive-pack" if service == "receive-pack" else "upload-pack")
        return await git(
            command, *far_side, *args,
            git_dir=self.path if in_mirror else None, config=config, secrets=secrets, timeout=timeout,
            max_output=MAX_OUTPUT,
        )  # fmt: skip

    def _remove_stale_locks(self) -> None:
        """Remove what a killed git left behind; while we hold the lock nobody else changes refs for that long."""
        oldest = time.time() - _STALE_LOCK_S
        places = [self.path.glob("*.lock"), (self.path / "refs").rglob("*.lock")]
        for place in places:
            for file in place:
                with contextlib.suppress(FileNotFoundError):
                    if file.stat().st_mtime < oldest:
                        file.unlink()


async def remove_unfinished(data_dir: Path) -> None:
    """Remove the clones that servers began and did not live to finish."""
    await asyncio.to_thread(_remove_unfinished, data_dir / "mirrors")


def _remove_unfinished(folder: Path) -> None:
    for unfinished in folder.glob("*.new"):
        # Whoever makes it holds the lock.
        descriptor = os.open(unfinished.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(unfinished, ignore_errors=True)
        finally:
            os.close(descriptor)
