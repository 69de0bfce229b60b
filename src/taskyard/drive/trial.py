"""The sandbox of an environment without a run, for a person who wants to try what an agent could do in it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from taskyard.db.engine import Database, Row
from taskyard.drive.hooks import run_setup
from taskyard.drive.setup import spec_of
from taskyard.drive.start import GATEWAY_VARIABLES, output_bytes
from taskyard.drive.traffic import network_note, routes
from taskyard.drive.variables import user_variables
from taskyard.environments import domains
from taskyard.gateway.server import Gateway, ModelCall, Policy, Refusal
from taskyard.sandbox.provider import Process, Provider, Sandbox
from taskyard.settings import Settings

NO_MODEL: tuple[str, ...] = ()
PREFIX = "trial-"
"""Of the sandbox's name. The run of none: what a dead command left is swept."""


@dataclass(frozen=True)
class Trial:
    """A sandbox with its way out."""

    sandbox: Sandbox
    gateway: Gateway
    env: dict[str, str]

    async def start(self, argv: list[str], env: dict[str, str]) -> Process:
        """Start a command as an agent is started. Raises SandboxError."""
        return await self.sandbox.exec(
            argv, env={**self.env, **env}, stdin=True, on_listener=self.gateway.serve
        )


@asynccontextmanager
async def open_trial(
    settings: Settings,
    database: Database,
    provider: Provider,
    environment: Row | None,
    say: Callable[[str], Awaitable[None]],
    refused: Callable[[Refusal], None],
    *,
    setup: bool,
) -> AsyncIterator[Trial]:
    """Make the sandbox that a run in this environment gets, and remove it in the end.

    Its limits, variables, network and set-up script are those of a run; there is no repository, and no model answers.
    say: gets what a person should know, and the script's output. refused: told what the gateway turns away.
    Raises RunFailure: environment_failed, setup_failed; SandboxError, SetupError.
    """
    variables = await user_variables(settings, database, environment)
    network = domains.network(settings, environment)
    if note := network_note(network, environment):
        await say(note)

    def called(_: ModelCall) -> None:
        pass  # it was refused, and cost nothing

    async with AsyncExitStack() as steps:
        spec = spec_of(settings, PREFIX + secrets.token_hex(6), environment)
        sandbox = await provider.create(spec)
        steps.push_async_callback(sandbox.destroy)
        policy = Policy(spec.id, routes(settings), network, allowed_models=[NO_MODEL])
        gateway = Gateway(policy, on_refusal=refused, on_usage=called)
        steps.push_async_callback(gateway.close)
        trial = Trial(sandbox, gateway, {**variables, **GATEWAY_VARIABLES})
        if setup and environment is not None and environment["setup_script"].strip():
            await say("Running the set-up script")
            await run_setup(
                environment,
                sandbox,
                gateway,
                say,
                env=trial.env,
                cwd=sandbox.workspace,
                timeout_s=settings.runs.setup_s,
                max_output=output_bytes(settings),
            )
        yield trial
