"""A repository, its mirror, and a sandbox with a clone of it."""

from __future__ import annotations

from pathlib import Path

from taskyard.drive.workspace import Workspace, bundle, commit_leftovers, prepare
from taskyard.forge.git import Mirror, check_origin
from taskyard.sandbox.provider import Sandbox
from tests.support.repositories import make_repository


class Desk:
    """An origin, its mirror, and a sandbox with a clone of it."""

    def __init__(self, tmp_path: Path, sandbox: Sandbox) -> None:
        self.origin = make_repository(tmp_path / "origin")
        self.mirror = Mirror.of(tmp_path / "data", check_origin(str(self.origin)))
        self.sandbox = sandbox
        self.folder = tmp_path / "bundles"
        self.folder.mkdir()
        self.workspace = Workspace("", "", None)

    async def clone(self, base: str | None = None) -> Workspace:
        self.workspace = await prepare(self.sandbox, self.mirror, base, "Acme/Shop")
        return self.workspace

    async def agent(self, script: str) -> str:
        """Run a shell script in the clone, as an agent would; its output."""
        identity = {"GIT_AUTHOR_NAME": "Bot", "GIT_AUTHOR_EMAIL": "bot@example.com"}
        process = await self.sandbox.exec(
            ["/bin/sh", "-ec", script],
            env={**identity, "GIT_COMMITTER_NAME": "Bot", "GIT_COMMITTER_EMAIL": "bot@example.com"},
            cwd=self.workspace.path,
        )
        output: bytes = await process.stdout.read()
        done = await process.wait()
        await process.kill()
        assert done.code == 0, done.stderr_tail
        return output.decode().strip()

    async def leftovers(self, title: str = "Fix the importer") -> tuple[bool, str | None]:
        done = await commit_leftovers(self.sandbox, self.workspace, "TY-7", title)
        return done.committed, done.note

    async def bundle(self, max_bytes: int = 10_000_000) -> Path | None:
        """A copy of the bundle; None when there is nothing to bring out."""
        async with bundle(self.sandbox, self.workspace, max_bytes, folder=self.folder) as path:
            return None if path is None else path.rename(path.with_suffix(".kept"))
