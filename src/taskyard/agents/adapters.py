"""Adapters: what the server must know of each agent program, as data.

One ACP client drives them all; an adapter holds what differs (measured with the versions pinned here):
the command, the environment, mode ids, how a model is chosen, what its usage numbers mean. Agents run in
the server's sandbox with no network but the gateway, and get a dummy key: the real one stays outside.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from taskyard.errors import SetupError
from taskyard.settings import AgentSettings, Settings

Json = dict[str, Any]

DEFAULT_AGENT = "claude"
"""The agent of a run that names none."""
GATEWAY = "http://127.0.0.1:3128"
"""The gateway as seen inside a sandbox."""
DUMMY_KEY = "taskyard-gateway"
"""The agents insist on a key; the gateway replaces it."""

Usage = Literal["per_turn", "cumulative", "last_call", "meta", "none"]
"""What `PromptResult.usage` counts: the turn, the session so far, the turn's last model call; or the numbers
stand in the answer's `_meta`; or there are none."""

EFFORTS = ("low", "medium", "high", "xhigh", "max")

CONTRACT_MODES: Mapping[str, tuple[str, ...]] = {
    "claude": ("default", "acceptEdits", "plan", "bypassPermissions", "auto"),
    "codex": ("auto", "read-only", "full-access", "plan"),
}
"""Values of `initial_permission_mode` for each `runtime_adapter` (tasks-api §4.8.1)."""

_CLAUDE_EFFORTS: Mapping[str, tuple[str, ...]] = {
    "claude-opus-4-5": ("low", "medium", "high"),
    "claude-opus-4-6": EFFORTS,
    "claude-opus-4-7": EFFORTS,
    "claude-opus-4-8": EFFORTS,
    "claude-fable-5": EFFORTS,
    "claude-sonnet-4-6": ("low", "medium", "high"),
    "claude-sonnet-5": ("low", "medium", "high"),
}
_CODEX_EFFORTS: Mapping[str, tuple[str, ...]] = {"gpt-5.5": ("low", "medium", "high", "xhigh")}


def allowed_efforts(adapter: str, model: str | None) -> tuple[str, ...]:
    """Values of `reasoning_effort` for an adapter and model (tasks-api §4.8.1); empty: none may be given."""
    if adapter == "codex":
        return _CODEX_EFFORTS.get(model or "", ("low", "medium", "high"))
    return _CLAUDE_EFFORTS.get(model or "", ()) if adapter == "claude" else ()


@dataclass(frozen=True)
class Package:
    """An npm package that is installed by `taskyard agents install`.

    `pins` are further packages installed beside it at an exact version; `floating` says which dependencies
    of it have no fixed version. Size and time were measured on Linux x86-64.
    """

    npm: str
    version: str
    entry: str
    licence: str
    size_mb: int
    install_s: int
    pins: tuple[str, ...] = ()
    floating: str = ""


@dataclass(frozen=True)
class Adapter:
    """One agent program and how to drive it. All of it is data; see `argv` and `environment`."""

    name: str
    title: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    launch_env: Mapping[str, str | Json] = field(default_factory=dict)
    """Variables that depend on the run: "{model}" and "{effort}" are replaced, what has no value is left out,
    and an object becomes JSON."""
    modes: Mapping[str, str] = field(default_factory=dict)
    """Permission mode of the contract -> the agent's mode id. A mode not listed is its own id."""
    mode_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Permission mode of the contract -> config options (id -> value) that belong to it."""
    default_mode: str | None = None
    """The contract's name of the mode in which a run starts that asks for none; None leaves the agent's own."""
    default_model: str | None = None
    options: Mapping[str, str] = field(default_factory=lambda: {"model": "model", "effort": "thought_level"})
    """What a run may choose -> the category of the agent's config option for it."""
    initialize_meta: Mapping[str, Any] = field(default_factory=dict)
    new_session_meta: Mapping[str, Any] = field(default_factory=dict)
    """`_meta` of sessions; see `session_meta`."""
    usage: Usage = "per_turn"
    provider: Literal["anthropic", "openai"] | None = None
    """Whose model API it speaks, through the gateway."""
    state_env: str | None = None
    """The variable that names the agent's state folder."""
    state_dir: str | None = None
    """That folder, relative to the agent's home."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Configuration to write below the state folder before the start: relative path -> text."""
    session_paths: tuple[str, ...] = ()
    """What to keep of the state folder so that a session can be opened again elsewhere."""
    exit_grace_s: float = 5.0
    """Seconds from the end of its input to SIGTERM, and from there to SIGKILL."""
    image_command: tuple[str, ...] = ()
    """The command where the programs are those of a container image; empty: the same."""
    package: Package | None = None
    folder: Path | None = None
    """Where the package is, or will be, installed."""

    @property
    def installed(self) -> bool:
        """Whether the program is there; True for a command that the settings name."""
        return self.package is None or Path(self.command[-1]).is_file()

    def argv(self) -> list[str]:
        """The command to start it. Raises AgentNotInstalledError."""
        if not self.installed:
            raise AgentNotInstalledError(
                f"The agent '{self.name}' is not installed. Install it with: taskyard agents install {self.name}"
            )
        return list(self.command)

    def argv_in_image(self) -> list[str]:
        """The command to start it in a sandbox that is made of an image, which has to have it."""
        return list(self.image_command or self.command)

    def environment(self, model: str | None = None, effort: str | None = None) -> dict[str, str]:
        """The agent's variables for a run; without `model` its default model is used.

        The name of the state folder (`state_env`) and the sandbox's own variables are the caller's to add.
        """
        values = {"{model}": model or self.default_model, "{effort}": effort}
        env = dict(self.env)
        for name, template in self.launch_env.items():
            value = _filled(template, values)
            if value is not None:
                env[name] = value if isinstance(value, str) else json.dumps(value)
        return env

    def session_meta(self, tools: Sequence[str] = ()) -> Json:
        """`_meta` of a session. tools: those of the server's own, as `server__tool`, that are called without asking."""
        allowed = [f"mcp__{tool}" for tool in tools] or None
        found: Json = _filled(dict(self.new_session_meta), {"{tools}": allowed})
        return found

    def wanted_modes(self, mode: str | None) -> tuple[str, ...]:
        """Mode ids to look for in a session, best first, for a permission mode of the contract."""
        name = mode or self.default_mode
        return tuple(dict.fromkeys((self.modes.get(name, name), name))) if name else ()


def installed(known: Iterable[Adapter]) -> list[str]:
    """The names of those that could start on this machine at this moment."""
    return sorted(adapter.name for adapter in known if adapter.installed)


class AgentNotInstalledError(SetupError):
    """The agent's program is not installed."""

    code = "agent_not_installed"


def adapters(settings: Settings) -> dict[str, Adapter]:
    """All adapters by name: the built-in ones, changed and joined by `settings.agents`.

    An override of the command keeps what the adapter knows of modes and options, so another program (or
    another release) can stand in for it. Raises SetupError for a new name without a command.
    """
    found = {adapter.name: adapter for adapter in (_claude(settings), _codex(settings), _scripted())}
    for name, override in settings.agents.items():
        found[name] = _overridden(name, found.get(name), override)
    return found


def _overridden(name: str, adapter: Adapter | None, override: AgentSettings) -> Adapter:
    if adapter is None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", name):
            raise SetupError(f"agents.{name}: a name has lower-case letters, digits, '-' and '_' only.")
        if not override.command:
            raise SetupError(
                f"agents.{name}: '{name}' is no built-in agent, so it needs a command. "
                f'Set agents.{name}.command to a list, for example ["opencode", "acp"].'
            )
        adapter = Adapter(name=name, title=name, command=())
    if override.command is not None:
        if not override.command:
            raise SetupError(f"agents.{name}.command is empty.")
        adapter = replace(
            adapter, command=tuple(override.command), image_command=(), package=None, folder=None
        )
    return replace(
        adapter,
        env={**adapter.env, **override.env},
        default_model=override.model or adapter.default_model,
    )


_COMMON_ENV = {
    "LLM_GATEWAY_URL": GATEWAY,
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


def _claude(settings: Settings) -> Adapter:
    package = Package(
        npm="@agentclientprotocol/claude-agent-acp",
        version="0.101.0",
        entry="dist/index.js",
        licence="Apache-2.0; the Claude Code program it brings: Anthropic's commercial terms",
        size_mb=401,
        install_s=12,
        floating="what the Claude Agent SDK (0.3.318, exact, with its program) depends on",
    )
    folder = _folder(settings, "claude", package)
    return Adapter(
        name="claude",
        title="Claude Code",
        command=_node_command(folder, package),
        image_command=("claude-agent-acp",),
        env={
            **_COMMON_ENV,
            "ANTHROPIC_BASE_URL": f"{GATEWAY}/anthropic",
            "ANTHROPIC_API_KEY": DUMMY_KEY,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_MAX_RETRIES": "5",  # the default goes on for minutes, also after a 401
            "DISABLE_AUTOUPDATER": "1",
            "ENABLE_TOOL_SEARCH": "false",  # puts MCP tools into the tool list instead of behind a search
            "IS_SANDBOX": "1",  # without it root is refused bypassPermissions
        },
        # Its model option lists short names only and refuses the contract's ids; the variable takes both.
        launch_env={"ANTHROPIC_MODEL": "{model}"},
        modes={mode: mode for mode in CONTRACT_MODES["claude"]},
        default_mode="bypassPermissions",
        default_model="opus",
        # Without the first two each session costs two more model calls.
        new_session_meta={
            "claudeCode": {
                "options": {"title": "Taskyard run", "promptSuggestions": False, "allowedTools": "{tools}"}
            }
        },
        provider="anthropic",
        state_env="CLAUDE_CONFIG_DIR",
        state_dir=".claude",
        session_paths=("projects",),
        package=package,
        folder=folder,
    )


def _codex(settings: Settings) -> Adapter:
    package = Package(
        npm="@agentclientprotocol/codex-acp",
        version="2.6.0",
        entry="dist/index.js",
        licence="Apache-2.0",
        size_mb=457,
        install_s=9,
        pins=("@openai/codex@0.166.0",),
        floating="the JavaScript libraries of the adapter (ACP SDK ~2.4.0, zod, diff, open, …)",
    )
    folder = _folder(settings, "codex", package)
    config: Json = {
        "model_provider": "taskyard",
        "model": "{model}",
        "model_reasoning_effort": "{effort}",
        "model_providers": {
            "taskyard": {
                "name": "taskyard",
                "base_url": f"{GATEWAY}/openai/v1",
                "env_key": "CODEX_API_KEY",
                "wire_api": "responses",
                "request_max_retries": 4,
                "stream_max_retries": 4,
            }
        },
    }
    return Adapter(
        name="codex",
        title="Codex",
        command=_node_command(folder, package),
        image_command=("codex-acp",),
        env={
            **_COMMON_ENV,
            "OPENAI_BASE_URL": f"{GATEWAY}/openai/v1",
            "CODEX_API_KEY": DUMMY_KEY,
            "CODEX_ACP_PROMPT_SUGGESTIONS": "false",  # a paid model call after each turn
            "INITIAL_AGENT_MODE": "agent-full-access",
            "MODEL_PROVIDER": "taskyard",
            "NO_BROWSER": "1",
        },
        # In its config: its options refuse a model, or an effort for a model, that it does not know.
        launch_env={"CODEX_CONFIG": config},
        # Codex's own sandbox cannot be nested in the server's: in its modes `read-only` and `workspace-write`
        # a command fails until the model asks for permission to run it outside. That is what `read-only`
        # means; but `auto` is to ask for nothing inside the workspace, and the server's sandbox already
        # denies all the rest. (`agent`, Codex's default, has a paid model decide.)
        modes={
            "auto": "agent-full-access",
            "read-only": "read-only",
            "full-access": "agent-full-access",
            "plan": "read-only",
        },
        mode_options={"plan": {"collaboration_mode": "plan"}},
        default_mode="full-access",
        default_model="gpt-5.5",
        provider="openai",
        # Without it a client that opted in to the failure report is not sent what commands write.
        initialize_meta={"terminal_output_delta": True},
        state_env="CODEX_HOME",
        state_dir=".codex",
        # In CODEX_CONFIG these come too late: Codex has then already tried its vendor's hosts.
        files={"config.toml": "[analytics]\nenabled = false\n\n[features]\nplugins = false\n"},
        session_paths=("sessions",),
        package=package,
        folder=folder,
    )


def _scripted() -> Adapter:
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    program = ("-I", str(Path(__file__).with_name("scripted.py")))
    return Adapter(
        name="scripted",
        title="Scripted demo agent (a stand-in, no model)",
        command=(python, *program),
        image_command=("python3", *program),
        modes={mode: mode for mode in CONTRACT_MODES["claude"]},
        default_mode="bypassPermissions",
        state_env="TASKYARD_SCRIPTED_HOME",
        state_dir=".scripted",
        session_paths=("sessions",),
        exit_grace_s=2.0,
    )


def _folder(settings: Settings, name: str, package: Package) -> Path:
    return settings.data_dir.absolute() / "agents" / f"{name}-{package.version}"


def _node_command(folder: Path, package: Package) -> tuple[str, ...]:
    return (shutil.which("node") or "node", str(folder / "node_modules" / package.npm / package.entry))


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(template, str):
        return values.get(template, template)
    if isinstance(template, dict):
        filled = {key: _filled(value, values) for key, value in template.items()}
        return {key: value for key, value in filled.items() if value is not None}
    return template
