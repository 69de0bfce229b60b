"""Setting a run up: its sandbox, its workspace, its agent, out of what there is of an earlier worker or run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from uuid import UUID

import structlog

from taskyard.db.engine import Row
from taskyard.drive import layers
from taskyard.drive.checkpoint import Keeper, base_of, pushed_before
from taskyard.drive.failures import AgentLost, Ended, ErrorType, Leave, OutputGiven, RunFailure
from taskyard.drive.hooks import run_setup
from taskyard.drive.result import submit_tool
from taskyard.drive.snapshot import SnapshotError
from taskyard.drive.space import no_space
from taskyard.drive.start import adapter_of, base_environment, output_bytes, start_agent
from taskyard.drive.traffic import open_gateway
from taskyard.drive.turns import ConversingRun
from taskyard.drive.variables import environment_of, user_variables
from taskyard.drive.work import Work
from taskyard.drive.workspace import WorkspaceError
from taskyard.errors import TaskyardError
from taskyard.events import entries
from taskyard.events.store import LeaseLostError
from taskyard.objects.interface import StorageError
from taskyard.redact import secret_values
from taskyard.runs import resume
from taskyard.runs import store as runs
from taskyard.runs.resume import Checkpoint
from taskyard.sandbox.provider import KilledError, Limits, Sandbox, SandboxError, Spec
from taskyard.settings import Settings

log = structlog.get_logger()

SPARE_S = 600.0
"""A sandbox that the server cannot reach any more ends the agent by itself, so much after the run's deadline."""


def spec_of(settings: Settings, name: str, environment: Row | None) -> Spec:
    """The sandbox that a run of this name gets. Raises SandboxError when the site does not allow its image."""
    limits = settings.sandbox
    image = environment["image"] if environment is not None else None
    if (problem := limits.image_problem(image)) is not None:
        raise SandboxError(problem)
    return Spec(
        id=name,
        limits=Limits(
            cpus=limits.cpus,
            memory_mb=limits.memory_mb,
            pids=limits.pids,
            tmp_mb=limits.tmp_mb,
            disk_mb=limits.disk_mb or None,
        ),
        image=image,
        needs=frozenset(limits.require),
    )


def _kind(settings: Settings, environment: Row) -> str:
    """What a sandbox of an environment is made by, and of."""
    area = settings.sandbox
    images = {"docker": area.docker.image, "kubernetes": area.kubernetes.image}
    return f"{area.provider} {environment['image'] or images.get(area.provider, '')}"


class PreparingRun(ConversingRun):
    _was_set_up = False
    """Everything before the agent was done in this sandbox."""
    _environment: Row | None = None

    async def _set_up(self) -> None:
        """Make everything that a turn needs. Raises RunFailure."""
        state = self._row["state"]
        adapter = adapter_of(self.parts.settings, state)
        own = await self._patiently(lambda: resume.checkpoint_of(self.parts.database, self.lease.run_id))
        kept = own
        if (own is None or not own.keys) and not self._row["pushed"]:
            # Nothing that was done in this run is kept: it goes on from the run that it resumes.
            kept = await self._predecessor() or own
        self._keeper = Keeper(self.parts.database, self.parts.objects, self.lease, self._row["task_id"], own)
        parts = self.parts
        self._environment = environment = await self._patiently(
            lambda: environment_of(parts.database, self._row)
        )
        label = "Setting up sandbox" if not self._resumed else "Setting up sandbox again"
        async with self._step("sandbox", label, "sandbox_failed"):
            here = await self._attend(self._find_sandbox())
        assert self._sandbox is not None
        # No agent was in it yet: all that is there comes from the mirror, and from the base branch.
        fresh = not here and kept is None and not self._resumed and not self._row["pushed"]
        self._work, self._whole = self._new_work(self._sandbox), False
        here = self._whole = await self._attend(self._fill_workspace(kept, here=here))
        variables = await self._patiently(lambda: user_variables(parts.settings, parts.database, environment))
        self._hide(secret_values(variables))
        if environment is not None and environment["setup_script"].strip() and not here:
            async with self._step("setup", "Running the set-up script", "setup_failed"):
                await self._attend(
                    self._run_setup(self._sandbox, self._work, environment, variables, fresh=fresh)
                )
        self._was_set_up = True
        if here:
            kept = own
        session_id: str | None = None
        if kept is not None and kept.agent == adapter.name and not (kept is not own and self._has_turns):
            session_id = kept.session_id
            if not here and not await self._attend(self._bring_session(kept)):
                session_id = None
        async with self._step("agent", "Starting agent", "agent_start_failed"):
            await self._attend(
                self._make_agent(self._sandbox, self._work, environment, variables, session_id)
            )
        agent = self._agent
        assert agent is not None
        await self._patiently(self._note)
        self._whole = True
        self.recorder.add(
            entries.named(
                "_posthog/run_started",
                {
                    "sessionId": agent.session_id,
                    "runId": self.run_id,
                    "taskId": str(self._row["task_id"]),
                    "agentVersion": agent.version,
                },
            )
        )
        if self._resumed or agent.loaded:
            self.recorder.add(
                entries.named(
                    "_posthog/session/resume", {"sessionId": agent.session_id, "loaded": agent.loaded}
                )
            )

    @property
    def _has_turns(self) -> bool:
        """Turns of this run have ended: the session of the run that it resumes does not know them."""
        return bool(self._row["state"].get("handoff_resumed")) or (
            self.turn is not None and self.turn.number > 1
        )

    async def _predecessor(self) -> Checkpoint | None:
        """The checkpoint of the newest run that this one resumes and that has one."""
        if "resume_from_run_id" not in self._row["state"]:
            return None
        chain = await self._patiently(lambda: runs.chain(self.parts.database, self._row))
        for run_id in reversed(chain[:-1]):
            if found := await self._checkpoint_of(run_id):
                return found
        return None

    async def _checkpoint_of(self, run_id: UUID) -> Checkpoint | None:
        return await self._patiently(lambda: resume.checkpoint_of(self.parts.database, run_id))

    # What is made is kept by what makes it, not by who waits for it: an end of the run may come at the same
    # moment, and what nobody knows of is never freed.

    async def _find_sandbox(self) -> bool:
        """The sandbox of the earlier worker, when that was here and had made it whole (True); else a new one."""
        if self._sandbox is not None:
            return self._was_set_up  # only its agent was lost
        keeper = self._keeper
        assert keeper is not None
        provider = self.parts.provider
        spec = self._spec(self.run_id)
        try:
            left = await provider.attach(self.run_id)
        except SandboxError as error:
            # A worker on this machine is stopped, or not gone yet; it can do no harm, it has lost the run.
            log.info("the folder of a run is in use, taking another", run=self.run_id, reason=error.detail)
            await self._patiently(keeper.begin_anew)
            self._sandbox = await provider.create(self._spec(f"{self.run_id}.{self.lease.generation}"))
            return False
        # Who took the run in between may have gone on elsewhere, or have died while it filled this one.
        place = self.parts.place
        if left is not None and self.claimed.place == place and keeper.is_whole(place, left.id):
            self._sandbox = left
            return True
        await self._patiently(keeper.begin_anew)
        if left is not None:
            await left.destroy()
        self._sandbox = await provider.create(spec)
        return False

    def _spec(self, name: str) -> Spec:
        return spec_of(self.parts.settings, name, self._environment)

    def _new_work(self, sandbox: Sandbox) -> Work:
        parts = self.parts
        return Work(parts.settings, parts.database, self._row, sandbox, self.recorder, self._remember_push)

    async def _remember_push(self, commit: str) -> None:
        await self._patiently(lambda: resume.add_pushed(self.parts.database, self.lease, commit))
        self._row["pushed"] = [*self._row["pushed"], commit][-resume.KEPT_PUSHES :]

    async def _fill_workspace(self, kept: Checkpoint | None, *, here: bool) -> bool:
        """Check the repository out, or go on with what is there; whether the sandbox is as it was left."""
        work, keeper, sandbox = self._work, self._keeper, self._sandbox
        assert work is not None
        assert keeper is not None
        assert sandbox is not None
        repository = self._task["repository"]
        base, left = base_of(kept), base_of(keeper.newest)
        if here and (left is not None or not repository):
            try:
                if left is not None:
                    await work.use_again(left)
            except (WorkspaceError, SandboxError) as error:
                log.warning("a sandbox cannot be used again", run=self.run_id, reason=error.detail)
                await self._patiently(keeper.begin_anew)
                await sandbox.destroy()
                self._sandbox = sandbox = await self.parts.provider.create(self._spec(sandbox.id))
                self._work = work = self._new_work(sandbox)
            else:
                return True
        if repository:
            branch = self._row["branch"] if base is None else base.base_branch
            label = f"Cloning {repository}" + (f" at {branch}" if branch else "")
            async with self._step("clone", label, "clone_failed"):
                if base is None:
                    await work.check_out()
                else:
                    await work.check_out_again(base)
                if kept is not None:
                    await self._bring(keeper, sandbox, work, kept)
                if keeper.newest is not None or self._row["pushed"]:
                    await self._catch_up(keeper, work)
            if self._row["branch"] is None:
                await self._change(state={"pr_base_branch": work.base_branch})
        elif kept is not None and "files" in kept.parts:
            async with self._step("workspace", "Bringing back the workspace", "clone_failed"):
                await self._bring(keeper, sandbox, work, kept)
        return False

    async def _bring(self, keeper: Keeper, sandbox: Sandbox, work: Work, kept: Checkpoint) -> None:
        try:
            await keeper.bring_workspace(sandbox, work, kept)
        except (SnapshotError, StorageError) as error:
            raise RunFailure("resume_failed", error.detail) from error

    async def _catch_up(self, keeper: Keeper, work: Work) -> None:
        """What was pushed after the checkpoint was made would be lost when the next work is pushed."""
        try:
            newest = keeper.newest
            fresh = newest is None or "workspace" not in newest.parts
            commit = await work.catch_up(pushed_before(newest), fresh=fresh)
        except SnapshotError as error:
            raise RunFailure("resume_failed", error.detail) from error
        if commit is not None:
            await self._say(f"The workspace goes on from the published commit {commit[:12]}.")

    async def _bring_session(self, kept: Checkpoint) -> bool:
        """The agent's session files; without them it gets the conversation as a text."""
        assert self._keeper is not None
        assert self._sandbox is not None
        adapter = adapter_of(self.parts.settings, self._row["state"])
        try:
            return await self._keeper.bring_session(self._sandbox, adapter, kept)
        except (SnapshotError, StorageError) as error:
            log.warning("the session of an agent is lost", run=self.run_id, reason=error.detail)
            return False

    async def _run_setup(
        self,
        sandbox: Sandbox,
        work: Work,
        environment: Row,
        variables: Mapping[str, str],
        *,
        fresh: bool,
    ) -> None:
        """The environment's script, or what it made in an earlier run that was like this one.

        What it does outside of the workspace stays with the sandbox only. fresh: no agent has changed the workspace.
        Else what the script makes is the agent's word, and of no use to other runs.
        """
        parts, keep_s = self.parts, self._limits.setup_cache_s
        key = layers.key_of(
            environment, self._task["repository"], work.workspace, _kind(parts.settings, environment)
        )
        if keep_s:
            try:
                age = await layers.bring(parts.settings.data_dir, key, sandbox, keep_s)
            except SnapshotError as error:
                log.warning("what a set-up script made cannot be used again", reason=error.detail)
            else:
                if age is not None:
                    await self._say(
                        f"The set-up script ran {age / 60:.0f} minutes ago; its result is used again."
                    )
                    return
        kept = keep_s > 0 and fresh
        began = await layers.now_inside(sandbox) if kept else ""
        gateway = await open_gateway(
            parts.settings, parts.database, self._row, environment, self.recorder, git=work.served
        )
        try:
            await run_setup(
                environment,
                sandbox,
                gateway,
                self._say,
                env={**variables, **base_environment(self._row, work)},
                cwd=work.path,
                timeout_s=self._limits.setup_s,
                max_output=output_bytes(parts.settings),
            )
        finally:
            await asyncio.shield(gateway.close())
        if kept:
            await layers.keep(parts.settings.data_dir, key, sandbox, began)

    async def _say(self, line: str) -> None:
        self.recorder.add(entries.console(self.run_id, "info", line))
        await self.recorder.room()

    async def _make_agent(
        self,
        sandbox: Sandbox,
        work: Work,
        environment: Row | None,
        variables: Mapping[str, str],
        session_id: str | None,
    ) -> None:
        parts = self.parts
        asked = self.turn.permissions if self.turn is not None and self.turn.open else ()
        schema = self._task["json_schema"]
        self._agent = await start_agent(
            parts.settings,
            parts.database,
            self._row,
            sandbox,
            work,
            self.recorder,
            environment,
            variables,
            session_id=session_id,
            asked=asked,
            tools=[] if schema is None else [await submit_tool(schema, self._submit)],
            on_budget=lambda _: self._wake.set(),
            seconds=max(self._ends_at - self._loop.time(), 0.0) + SPARE_S,
        )

    async def _note(self) -> None:
        assert self._keeper is not None
        assert self._agent is not None
        assert self._work is not None
        assert self._sandbox is not None
        agent, place = self._agent, self.parts.place
        await self._keeper.note(
            agent.adapter.name, agent.session_id, self._work.workspace, place, self._sandbox
        )

    async def _leave_if_full(self, said: str) -> None:
        """A full disk is the worker's trouble: the run goes back into the queue, a few times. Raises Leave."""
        if not await asyncio.to_thread(no_space, self.parts.settings.data_dir, said):
            return
        tries = await self._patiently(lambda: resume.count_resume(self.parts.database, self.lease))
        if tries <= self._limits.max_attempts:
            log.warning("the disk is full, giving a run back", run=self.run_id, reason=said)
            raise Leave

    @asynccontextmanager
    async def _step(self, step: str, label: str, error_type: ErrorType) -> AsyncIterator[None]:
        """One step of the set-up, shown as progress; its failure is the run's."""
        self.recorder.add(entries.progress(self.run_id, step, "in_progress", label))
        try:
            yield
        except (Ended, OutputGiven, Leave, AgentLost, asyncio.CancelledError, LeaseLostError):
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, "Cancelled"))
            raise
        except (RunFailure, TaskyardError) as error:
            said = error.message if isinstance(error, RunFailure) else error.detail
            detail = self._shown(said)
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, detail))
            if isinstance(error, KilledError):
                raise AgentLost(f"{label} was cut short: {detail}.") from error
            await self._leave_if_full(said)
            if isinstance(error, RunFailure):
                raise
            raise RunFailure(error_type, detail) from error
        except Exception:
            self.recorder.add(entries.progress(self.run_id, step, "failed", label, "Internal error"))
            raise
        self.recorder.add(entries.progress(self.run_id, step, "completed", label))
