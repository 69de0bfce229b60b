"""Starting the agent of a run: its environment, its process, its session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import structlog

from taskyard.agents.acp import (
    AcpConnection,
    AcpError,
    AgentGoneError,
    ProtocolVersionError,
    Session,
)
from taskyard.agents.adapters import DEFAULT_AGENT, GATEWAY, Adapter, AgentNotInstalledError, adapters
from taskyard.agents.options import choose_mode, option_for
from taskyard.db.engine import Database, Row
from taskyard.drive.failures import RunFailure, with_tail
from taskyard.drive.inside import feed, script
from taskyard.drive.permissions import Permissions
from taskyard.drive.recorder import Recorder
from taskyard.drive.result import SERVER
from taskyard.drive.session import AgentSession
from taskyard.drive.traffic import open_gateway
from taskyard.drive.transcript import Transcript
from taskyard.drive.work import Work
from taskyard.environments.mcp import OWN_SERVER, UnknownVariableError, for_agent
from taskyard.errors import TaskyardError
from taskyard.events import entries
from taskyard.gateway.server import Gateway, Tool
from taskyard.sandbox.programs import named_files, program_mounts
from taskyard.sandbox.provider import Mount, Sandbox
from taskyard.settings import Settings

log = structlog.get_logger()
Json = dict[str, Any]

WRITE_S = 30.0
GATEWAY_VARIABLES = {
    "LLM_GATEWAY_URL": GATEWAY,
    "HTTP_PROXY": GATEWAY,
    "HTTPS_PROXY": GATEWAY,
    "http_proxy": GATEWAY,
    "https_proxy": GATEWAY,
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
"""What shows programs in a sandbox the way out."""


async def start_agent(
    settings: Settings,
    database: Database,
    row: Row,
    sandbox: Sandbox,
    work: Work,
    recorder: Recorder,
    environment: Row | None,
    variables: Mapping[str, str],
    *,
    session_id: str | None = None,
    asked: Sequence[Json] = (),
    tools: Sequence[Tool] = (),
    on_budget: Callable[[str], None] | None = None,
    seconds: float,
) -> AgentSession:
    """Start the run's agent in its sandbox and open a session, each step within `runs.start_s`.

    environment, variables: the run's sandbox environment, and its variables. session_id: of an earlier session whose
    files are in the sandbox; a new one is opened when the agent cannot go on with it. asked: permission requests of
    that session that were not answered. tools: of the server's own, for an agent that takes them.
    on_budget: called once, with a sentence, when the run's budget is used up.
    seconds: how long the agent's process may live, whatever becomes of the server.

    Raises RunFailure: environment_failed, agent_unknown, agent_not_installed, agent_start_failed, agent_start_timeout,
    agent_refused, or what a limit of the sandbox is called. Raises AgentLost when the process was killed from outside.
    """
    state = row["state"]
    adapter = adapter_of(settings, state)
    try:
        servers = for_agent(environment["mcp_servers"] if environment else (), variables)
    except UnknownVariableError as error:
        raise RunFailure("environment_failed", str(error)) from error
    if tools:
        servers.append(SERVER)
    agent: AgentSession | None = None
    try:
        async with asyncio.timeout(settings.runs.start_s):
            gateway = await open_gateway(
                settings,
                database,
                row,
                environment,
                recorder,
                git=work.served,
                tools=tools,
                on_budget=on_budget,
            )
            agent = await _spawn(
                gateway,
                adapter,
                variables,
                row,
                sandbox,
                work,
                recorder,
                asked,
                output_bytes(settings),
                seconds,
            )
            title = row["task"]["title"] or "Taskyard run"
            names = [f"{OWN_SERVER}__{tool.name}" for tool in tools]
            await _open(agent, adapter, state, title, work.path, recorder, session_id, servers, names)
    except AgentGoneError as error:
        assert agent is not None
        message = f"The agent '{adapter.name}' ended before it was ready"
        raise await agent.death(message, "agent_start_failed") from error
    except TimeoutError as error:
        tail = agent.stderr_tail() if agent else ""
        message = f"The agent '{adapter.name}' was not ready after {settings.runs.start_s:g} seconds."
        raise RunFailure("agent_start_timeout", with_tail(message, tail)) from error
    except (AcpError, ProtocolVersionError) as error:
        assert agent is not None
        reason = error.message if isinstance(error, AcpError) else error.detail
        message = f"The agent '{adapter.name}' refused to start a session: {reason}"
        raise RunFailure("agent_refused", with_tail(message, agent.stderr_tail())) from error
    else:
        started, agent = agent, None
        return started
    finally:
        if agent is not None:
            await asyncio.shield(agent.close())


def output_bytes(settings: Settings) -> int | None:
    """What a program of a run may write to its standard output and error."""
    return settings.sandbox.output_mb * 2**20 or None


def adapter_of(settings: Settings, state: Mapping[str, Any]) -> Adapter:
    """The adapter of a run's agent. Raises RunFailure: agent_unknown."""
    name = state.get("agent") or state.get("runtime_adapter") or DEFAULT_AGENT
    adapter = adapters(settings).get(name)
    if adapter is None:
        raise RunFailure(
            "agent_unknown", f"This worker has no agent '{name}'. `taskyard agents list` shows them."
        )
    return adapter


def _program(adapter: Adapter, sandbox: Sandbox) -> tuple[list[str], tuple[Mount, ...]]:
    """The command of an agent, and the files of the host that it needs. Raises AgentNotInstalledError."""
    if sandbox.host_programs:
        return program_mounts(adapter.argv())
    argv = adapter.argv_in_image()
    return argv, named_files(argv)


async def _spawn(
    gateway: Gateway,
    adapter: Adapter,
    variables: Mapping[str, str],
    row: Row,
    sandbox: Sandbox,
    work: Work,
    recorder: Recorder,
    asked: Sequence[Json],
    max_output: int | None,
    seconds: float,
) -> AgentSession:
    """Start the process. The gateway is its own from now on."""
    state, run_id = row["state"], str(row["id"])
    try:
        argv, mounts = _program(adapter, sandbox)
        env = {**variables, **_environment(adapter, row, sandbox, work)}  # the server's own names win
        await _write_files(adapter, sandbox)
        process = await sandbox.exec(
            argv,
            env=env,
            cwd=work.path,
            stdin=True,
            mounts=mounts,
            on_listener=gateway.serve,
            max_output=max_output,
            seconds=seconds,
        )
    except AgentNotInstalledError as error:
        await asyncio.shield(gateway.close())
        raise RunFailure("agent_not_installed", error.detail) from error
    except BaseException:
        await asyncio.shield(gateway.close())
        raise
    assert process.stdin is not None
    transcript = Transcript(recorder, recorder.secrets)
    permissions = Permissions(
        recorder,
        mode=state.get("initial_permission_mode") or adapter.default_mode or "",
        attended=state.get("mode") == "interactive",
        asked=asked,
    )
    connection = AcpConnection(
        process.stdout,
        process.stdin,
        on_update=transcript.update,
        on_request=permissions.answer,
        on_traffic=transcript.traffic,
        on_noise=lambda text: recorder.add(entries.console(run_id, "debug", text)),
        before_read=recorder.room,
    )
    return AgentSession(adapter, process, connection, gateway, transcript, permissions)


async def _open(
    agent: AgentSession,
    adapter: Adapter,
    state: Mapping[str, Any],
    title: str,
    cwd: str,
    recorder: Recorder,
    session_id: str | None,
    servers: Sequence[Json],
    own_tools: Sequence[str],
) -> None:
    """Handshake, session, title, permission mode, model and effort."""
    connection = agent.connection
    answer = await connection.initialize(adapter.initialize_meta)
    info = answer.get("agentInfo")
    agent.version = str(info.get("version", "")) if isinstance(info, dict) else ""
    usable = [server for server in servers if connection.takes(server)]
    agent.takes_tools = SERVER in usable
    # Who takes the result is the server that runs the agent, so no person is asked whether it may be given. The rule
    # is the agent's own and for this tool alone, where its name can mean no other.
    meta = adapter.session_meta(own_tools if agent.takes_tools else ())
    session = await _earlier_session(agent, session_id, cwd, usable, meta) if session_id else None
    agent.loaded = session is not None
    if session is None:
        session = await connection.new_session(cwd, usable, meta)
    agent.session = session
    await connection.set_title(session.id, title)

    def note(text: str) -> None:
        recorder.add(entries.console(session.id, "warn", text))

    for server in servers:
        if server not in usable:
            note(f"The agent takes no MCP servers over {server['type']}: it does without '{server['name']}'.")
    asked = state.get("initial_permission_mode")
    mode = choose_mode(session, *adapter.wanted_modes(asked))
    if mode is not None:
        await connection.set_mode(session.id, mode)
    elif asked:
        note(f"The agent has no permission mode '{asked}'; it runs in its own, '{session.current_mode}'.")
    for config_id, value in adapter.mode_options.get(asked or adapter.default_mode or "", {}).items():
        if any(option.get("id") == config_id for option in session.config_options):
            await connection.set_config_option(session.id, config_id, value)
    for choice, key in (("model", "model"), ("effort", "reasoning_effort")):
        if wanted := state.get(key):
            # What the environment has set already need not be an option; another program may not read it.
            told = f"{{{choice}}}" in str(adapter.launch_env)
            quiet = _ignore if told else note
            await _choose(connection, session, adapter.options.get(choice, ""), str(wanted), quiet)


async def _earlier_session(
    agent: AgentSession, session_id: str, cwd: str, servers: Sequence[Json], meta: Json
) -> Session | None:
    """The session that is to go on; None when the agent does not know it, or cannot do that."""
    try:
        return await agent.connection.load_session(session_id, cwd, servers, meta)
    except AcpError as error:
        log.info("an agent does not go on with its session", agent=agent.adapter.name, reason=error.message)
        return None


def _ignore(_: str) -> None:
    pass


async def _choose(
    connection: AcpConnection, session: Session, category: str, wanted: str, note: Callable[[str], None]
) -> None:
    """Set a config option by its category, where the session offers the value."""
    option = option_for(session, category)
    if option is None or wanted not in option.values:
        note(f"The agent does not offer {category} '{wanted}'; it keeps its own.")
    elif option.current != wanted:
        await connection.set_config_option(session.id, option.id, wanted)


def base_environment(row: Row, work: Work) -> dict[str, str]:
    """What every program of a run finds in its environment (run-lifecycle §5.1). No credential is among it."""
    name, email = work.author
    env = {
        "POSTHOG_PROJECT_ID": str(row["project_id"]),
        "POSTHOG_TASK_ID": str(row["task_id"]),
        "POSTHOG_TASK_RUN_ID": str(row["id"]),
        "GIT_AUTHOR_NAME": name,
        "GIT_AUTHOR_EMAIL": email,
        "GIT_COMMITTER_NAME": name,
        "GIT_COMMITTER_EMAIL": email,
        **GATEWAY_VARIABLES,
        **work.variables,
    }
    if previous := row["state"].get("resume_from_run_id"):
        env["POSTHOG_RESUME_RUN_ID"] = str(previous)
    return env


def _environment(adapter: Adapter, row: Row, sandbox: Sandbox, work: Work) -> dict[str, str]:
    """The same for the agent, with what its adapter needs."""
    state = row["state"]
    env = base_environment(row, work) | adapter.environment(state.get("model"), state.get("reasoning_effort"))
    if adapter.state_env and adapter.state_dir:
        env[adapter.state_env] = f"{sandbox.home}/{adapter.state_dir}"
    return env


async def _write_files(adapter: Adapter, sandbox: Sandbox) -> None:
    """The adapter's small configuration files, written inside the sandbox, as everything there is."""
    if adapter.state_dir is None:
        return
    folder = PurePosixPath(sandbox.home) / adapter.state_dir
    argv = 'mkdir -p "$(dirname "$1")" && cat > "$1"'
    for name, text in {".keep": "", **adapter.files}.items():
        target = str(folder / name)
        code, reason = await feed(sandbox, script(argv, target), _once(text.encode()), timeout=WRITE_S)
        if code != 0:
            raise SandboxWriteError(f"cannot write {target} in the sandbox: {reason}")


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


class SandboxWriteError(TaskyardError):
    """A file could not be written in the sandbox."""
