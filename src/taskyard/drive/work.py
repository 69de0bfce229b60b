"""The repository of one run: fetched, checked out in the sandbox, published after each turn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from taskyard.agents.adapters import GATEWAY
from taskyard.db.engine import Database, Row
from taskyard.drive import publish as publishing
from taskyard.drive import snapshot
from taskyard.drive import workspace as workspaces
from taskyard.drive.credentials import git_repository, git_variables, run_credentials
from taskyard.drive.publish import Published, branch_name
from taskyard.drive.recorder import Recorder
from taskyard.drive.workspace import IDENTITY, Workspace, WorkspaceError
from taskyard.events import entries
from taskyard.events.store import LeaseLostError
from taskyard.forge import service as forge
from taskyard.forge.git import BranchNotFoundError, Mirror, Origin
from taskyard.gateway.server import GitRepository
from taskyard.sandbox.provider import Sandbox
from taskyard.settings import Settings
from taskyard.tasks.naming import slug


class Work:
    """Where the agent works, and what of it is published. Without a repository nothing is."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        row: Row,
        sandbox: Sandbox,
        recorder: Recorder,
        remember: Callable[[str], Awaitable[None]],
    ) -> None:
        """`remember` keeps a commit that is about to be pushed, for the next worker. `row` has those as `pushed`."""
        self._settings = settings
        self._database = database
        self._row = row
        self._task = row["task"]
        self._sandbox = sandbox
        self._recorder = recorder
        self.credentials = run_credentials(settings, database, row)
        self.origin: Origin | None = None
        self.mirror: Mirror | None = None
        self.workspace: Workspace | None = None
        self._slug = slug(row["project_name"], self._task["task_number"])
        self._branch = branch_name(self._slug, str(row["id"]))
        output = row["output"] if isinstance(row["output"], dict) else {}
        # What an earlier worker published of this run.
        ours = output.get("head_branch") == self._branch
        self._published: str | None = output.get("commit_sha") if ours else None
        self._remember = remember
        self._pushed: set[str] = set(row["pushed"])
        """Commits that earlier workers, or the agent by itself, may have pushed there."""

    @property
    def path(self) -> str:
        """The agent's working directory, inside the sandbox."""
        return self._sandbox.workspace if self.workspace is None else self.workspace.path

    @property
    def base_branch(self) -> str | None:
        return None if self.workspace is None else self.workspace.base_branch

    async def check_out(self) -> None:
        """Clone the repository into the sandbox, at the run's base branch."""
        clone = await self._clone(self._row["branch"])
        base = self._row["state"].get("pr_base_branch")
        if clone.base_branch == self._branch and isinstance(base, str) and base:
            # The run goes on from what it has published itself: its base is what that was made from.
            clone = replace(clone, base_branch=base)
        self.workspace = clone

    async def check_out_again(self, base: Workspace) -> None:
        """Clone it for a checkpoint that was made on `base`: its branch may have moved on, or be gone."""
        try:
            clone = await self._clone(base.base_branch)
        except WorkspaceError:
            clone = await self._clone(None)
        self.workspace = Workspace(clone.path, base.base_branch, base.base_commit)

    @property
    def newest_push(self) -> str | None:
        """The commit that the run pushed last, or was about to push."""
        return self._row["pushed"][-1] if self._row["pushed"] else None

    async def catch_up(self, known: str | None, *, fresh: bool) -> str | None:
        """Go on from what the run has published and its checkpoint lacks; the commit, None when there is nothing.

        known: the newest push when the checkpoint was made. What the agent took back after that stays so. fresh: the
        checkpoint has no work, so the workspace is a new clone of the base branch, which may have moved on. Commits of
        others on the run's branch are not taken: publishing tells of them. Raises SnapshotError.
        """
        if self.workspace is None or self.mirror is None:
            return None
        with suppress(BranchNotFoundError):
            _, commit = await self.mirror.resolve(self._branch)
            if (
                commit is not None
                and commit != known
                and commit in {self._published, *self._pushed}
                and await snapshot.bring_forward(
                    self._sandbox, self.workspace, commit, self.mirror, fresh=fresh
                )
            ):
                return commit
        return None

    async def use_again(self, base: Workspace) -> None:
        """Go on in the folder of a sandbox that is still there. Raises WorkspaceError when it is damaged."""
        await workspaces.unlock(self._sandbox, base)
        self.mirror = await self._find_mirror()
        self.workspace = base

    async def _clone(self, branch: str | None) -> Workspace:
        self.mirror = await self._find_mirror()
        name, email = self.author
        return await workspaces.prepare(
            self._sandbox, self.mirror, branch, self._task["repository"], user_name=name, user_email=email
        )

    async def _find_mirror(self) -> Mirror:
        origin = await forge.resolve(
            self._database, self._settings.data_dir, self._row["project_id"], self._task["repository"]
        )
        self.origin = origin
        return Mirror.of(self._settings.data_dir, origin, self.credentials)

    @property
    def served(self) -> list[GitRepository]:
        """The repository as the gateway serves it, once it is checked out; none when git inside cannot reach it."""
        if self.origin is None:
            return []
        found = git_repository(
            self._task["repository"], self.origin, self._branch, self.credentials, self._agent_pushed
        )
        return [] if found is None else [found]

    async def _agent_pushed(self, commit: str) -> bool:
        """Remember what the agent is about to push; False when another worker has the run."""
        try:
            await self._remember(commit)
        except LeaseLostError:  # noticed by whoever watches the run
            return False
        self._pushed.add(commit)
        return True

    @property
    def variables(self) -> dict[str, str]:
        """What makes git inside the sandbox use the gateway for this repository."""
        if self.origin is None or not self.served:
            return {}
        return git_variables(GATEWAY, self._task["repository"], self.origin)

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
        if self.workspace is None or self.mirror is None:
            return None
        left = await workspaces.commit_leftovers(
            self._sandbox, self.workspace, self._slug, self._task["title"]
        )
        if left.note:
            self._recorder.add(entries.console(str(self._row["id"]), "warn", left.note))
        async with workspaces.bundle(self._sandbox, self.workspace) as bundle:
            if bundle is None:
                return None
            published = await publishing.publish(
                self.mirror,
                bundle,
                self.workspace.base_commit,
                self._branch,
                run_id=str(self._row["id"]),
                base_branch=self.workspace.base_branch,
                previous=self._published,
                pushed=self._pushed,
                before_push=self._remember,
            )
        news = published.commit != self._published
        self._published = published.commit
        return published if news else None
