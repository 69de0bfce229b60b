"""The repository of one run: fetched, checked out in the sandbox, published after each turn."""

from __future__ import annotations

import asyncio

from taskyard.db.engine import Database, Row
from taskyard.drive import publish as publishing
from taskyard.drive import workspace as workspaces
from taskyard.drive.publish import Published, branch_name
from taskyard.drive.recorder import Recorder
from taskyard.drive.workspace import IDENTITY, Workspace
from taskyard.events import entries
from taskyard.forge import service as forge
from taskyard.forge.git import Mirror
from taskyard.sandbox.provider import Sandbox
from taskyard.settings import Settings
from taskyard.tasks.naming import slug


class Work:
    """Where the agent works, and what of it is published. Without a repository nothing is."""

    def __init__(
        self, settings: Settings, database: Database, row: Row, sandbox: Sandbox, recorder: Recorder
    ) -> None:
        self._settings = settings
        self._database = database
        self._row = row
        self._task = row["task"]
        self._sandbox = sandbox
        self._recorder = recorder
        self._mirror: Mirror | None = None
        self._workspace: Workspace | None = None
        self._slug = slug(row["project_name"], self._task["task_number"])
        self._branch = branch_name(self._slug, str(row["id"]))
        output = row["output"] if isinstance(row["output"], dict) else {}
        # What an earlier worker published of this run.
        ours = output.get("head_branch") == self._branch
        self._published: str | None = output.get("commit_sha") if ours else None

    @property
    def path(self) -> str:
        """The agent's working directory, inside the sandbox."""
        return self._sandbox.workspace if self._workspace is None else self._workspace.path

    @property
    def base_branch(self) -> str | None:
        return None if self._workspace is None else self._workspace.base_branch

    async def check_out(self) -> None:
        """Clone the repository into the sandbox, at the run's base branch."""
        repository = self._task["repository"]
        origin = await forge.resolve(
            self._database, self._settings.data_dir, self._row["project_id"], repository
        )
        self._mirror = Mirror.of(self._settings.data_dir, origin)
        name, email = self.author
        self._workspace = await workspaces.prepare(
            self._sandbox, self._mirror, self._row["branch"], repository, user_name=name, user_email=email
        )

    @property
    def author(self) -> tuple[str, str]:
        """Name and e-mail of the agent's commits (run-lifecycle §4): the creator for authorship `user`."""
        state = self._row["state"]
        default = "user" if self._task["origin_product"] in ("", "user_created", "slack") else "bot"
        if state.get("pr_authorship_mode", default) == "user" and self._row["email"]:
            name = f"{self._row['first_name']} {self._row['last_name']}".strip()
            return name or self._row["email"], self._row["email"]
        return IDENTITY

    async def publish(self) -> Published | None:
        """Commit what is left, and bring new commits to the run's branch; None when there is nothing new."""
        if self._workspace is None or self._mirror is None:
            return None
        left = await workspaces.commit_leftovers(
            self._sandbox, self._workspace, self._slug, self._task["title"]
        )
        if left.note:
            self._recorder.add(entries.console(str(self._row["id"]), "warn", left.note))
        bundle = await workspaces.bundle(self._sandbox, self._workspace)
        if bundle is None:
            return None
        try:
            published = await publishing.publish(
                self._mirror,
                bundle,
                self._workspace.base_commit,
                self._branch,
                run_id=str(self._row["id"]),
                base_branch=self._workspace.base_branch,
                previous=self._published,
            )
        finally:
            await asyncio.to_thread(bundle.unlink, missing_ok=True)
        news = published.commit != self._published
        self._published = published.commit
        return published if news else None
