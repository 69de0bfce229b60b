"""Settings: environment variables with the prefix TASKYARD_, `.env`, and TOML, one model per area.

Order, first wins: environment, `.env`, `taskyard.toml` in the data folder (or the file named by
TASKYARD_CONFIG), defaults. Areas nest by a double underscore: TASKYARD_RUNS__AGENT_SILENCE_S=600.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from taskyard.redact import secrets_of
from taskyard.settings.area import Area
from taskyard.settings.sandboxes import SandboxSettings

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})

Pool = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""The name of a group of workers."""


class RunSettings(Area):
    """How runs live and end. Times in seconds."""

    background_end: Literal["turn", "inactivity"] = "turn"
    """When a background run completes: after its turn and published work, or only by inactivity."""
    agent_silence_s: float = Field(1200, gt=0)
    """A turn without any message of the agent for this long has failed (`agent_silent`)."""
    inactivity_s: float = Field(1800, gt=0)
    """A run without work or messages for this long completes."""
    setup_s: float = Field(600, gt=0)
    """Limit for the set-up script of an environment."""
    setup_cache_s: float = Field(3600, ge=0)
    """How long what a set-up script made in the home folder is used again on a worker's host instead of running it,
    for the same commit; scripts that change the workspace run each time. 0: all do."""
    start_s: float = Field(120, gt=0)
    """Limit for each step of the agent's start: spawn, handshake, session."""
    wall_clock_s: float = Field(6 * 3600, gt=0)
    """Hard limit for one run."""
    suspend_after_s: float = Field(300, gt=0)
    """A run that waits for a message or a permission for this long is suspended: its sandbox is freed, and made
    again when it goes on."""
    checkpoint_s: float = Field(60, gt=0)
    """A turn is saved this often while it goes on; it is always saved at its end."""
    max_attempts: int = Field(3, ge=0)
    """A run whose worker or agent is lost is driven again, this many times in a row without progress."""
    queue_timeout_s: float = Field(24 * 3600, gt=0)
    """A run that no worker took for this long has failed (`queue_timeout`)."""
    limit: int | None = Field(None, gt=0)
    """Runs that are driven at once on the whole site; more wait. Limits have to be the same on every machine."""
    limit_per_project: int | None = Field(None, gt=0)
    """The same for each project."""
    limit_per_agent: int | None = Field(None, gt=0)
    """The same for each agent; `agents.NAME.limit` says otherwise for one."""


class NetworkSettings(Area):
    """What sandboxes may reach besides the model APIs and their repository."""

    default: Literal["full", "trusted", "none"] = "full"
    """The level of runs without a sandbox environment (run-lifecycle §5.3: `full`)."""
    internal_hosts: list[str] = []
    """Hosts that are not on the public internet and that sandboxes may reach all the same, where their level allows
    it: names, `*.names` or addresses, each with or without a port."""
    max_bytes: int | None = Field(None, gt=0)
    """Of one run's traffic in both directions."""


class GitSettings(Area):
    """Private repositories over https."""

    tokens: dict[str, SecretStr] = {}
    """By host, or host and the beginning of the path: `{"github.com/acme": "…"}`; the longest that fits counts.
    Everybody who may make tasks here can use what such a token opens."""


class BudgetSettings(Area):
    """What a run may spend on models. US dollars, and tokens that are not read from a cache."""

    cost: float | None = Field(None, gt=0)
    """Of a run that asks for nothing else."""
    tokens: int | None = Field(None, gt=0)
    """The same in tokens."""
    max_cost: float | None = Field(None, gt=0)
    """Of any run, whatever it asks for."""
    max_tokens: int | None = Field(None, gt=0)
    """The same in tokens."""
    project_month_cost: float | None = Field(None, gt=0)
    """Of all runs of a project in a calendar month (UTC), as far as it is known when a run's agent starts."""
    end: Literal["failed", "completed"] = "failed"
    """How a run ends that has used up its budget."""


class Upstream(Area):
    """One model API. The key stays on the host; the gateway adds it to each request."""

    base_url: str
    """`https://host/path`; a `/v1` at its end is taken off, agents add it."""
    api_key: SecretStr | None = None
    """Default: the file's, else the vendor's usual environment variable."""
    api_key_file: Path | None = None
    """Read for each request, so another program may renew it."""
    auth: Literal["x-api-key", "bearer", "api-key", "none"] | None = None
    """The header that takes the key; default: as the API's vendor has it. `none`: the upstream wants no key."""
    version: str = "/v1"
    """What the upstream has in place of `/v1`, for clouds' own paths; may be empty."""
    headers: dict[str, SecretStr] = {}
    """Set on each request."""
    query: str = ""
    """Added to each request, such as `api-version=2025-04-01`."""

    @field_validator("base_url")
    @classmethod
    def _without_version(cls, value: str) -> str:
        """Agents add `/v1/…` themselves; many people write the base with it."""
        return value.rstrip("/").removesuffix("/v1")

    def key(self, fallback_env: str) -> str | None:
        """The key from the settings, its file, or the vendor's usual environment variable."""
        if self.api_key is not None:
            return self.api_key.get_secret_value()
        if self.api_key_file is not None:
            return self.api_key_file.read_text("utf-8").strip()
        return os.environ.get(fallback_env) or None


VENDORS = {"anthropic": "https://api.anthropic.com", "openai": "https://api.openai.com"}

KEY_VARIABLES = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}
"""Where the vendors' own tools look for a key."""


class ModelSettings(Area):
    """Where model traffic goes."""

    anthropic: Upstream = Upstream(base_url=VENDORS["anthropic"])
    openai: Upstream = Upstream(base_url=VENDORS["openai"])
    allowed: list[str] | None = None
    """Models that runs may use, `*` for any characters; default: all. Agents also use small models of their own."""
    prices: dict[str, dict[str, Any]] = {}
    """US dollars for a million tokens, by model: `{"my-model": {"input": 3, "output": 15}}`, with `cache_read` and
    `cache_write` if they differ from input. Adds to the built-in list and replaces its entries."""

    @field_validator("anthropic", "openai", mode="before")
    @classmethod
    def _at_the_vendors(cls, value: Any, info: ValidationInfo) -> Any:
        """Who sets a key only means the vendor's API."""
        return {"base_url": VENDORS[str(info.field_name)], **value} if isinstance(value, dict) else value


class AgentSettings(Area):
    """Override or definition of one agent adapter; unset fields keep the built-in adapter's value."""

    command: list[str] | None = None
    env: dict[str, str] = {}
    model: str | None = None
    limit: int | None = Field(None, gt=0)
    """Runs of this agent at once on the whole site; default: `runs.limit_per_agent`."""

    @field_validator("command", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError('has to be a JSON list, such as ["opencode", "acp"]') from None


class TaskSettings(Area):
    """Who sees which tasks, and how far a search counts."""

    visibility: Literal["project", "creator"] = "project"
    """`project`: members see all tasks of the project. `creator`: their own, those without a creator, and those of
    team-wide origins."""
    search_count_limit: int = Field(1000, ge=0)
    """A search counts its matches up to this many; beyond, `count` says how many there are at least. 0: always all."""


class RateLimitSettings(Area):
    """How many requests one API key may make (tasks-api §1.6)."""

    enabled: bool = True
    per_minute: int = Field(480, gt=0)
    per_hour: int = Field(4800, gt=0)


class SessionSettings(Area):
    """People who sign in at a browser."""

    idle_s: int = Field(7 * 24 * 3600, ge=300)
    """A browser that asks for nothing for this long is signed out; 30 days after the sign-in it is in any case."""


class OAuthClient(Area):
    """A program that may ask people for access. Public: it has no secret, PKCE stands in for one."""

    name: str = Field(min_length=1, max_length=100)
    """As people read it when they are asked."""
    redirect_uris: list[str] = Field(min_length=1)
    """Compared exactly; at a loopback address the port is free (RFC 8252 §7.3)."""

    @field_validator("redirect_uris")
    @classmethod
    def _safe(cls, values: list[str]) -> list[str]:
        for value in values:
            url = urlsplit(value)
            if not url.scheme or "#" in value or url.scheme in ("javascript", "data", "file"):
                raise ValueError(f"{value!r} is not an absolute URL without a fragment")
            if url.scheme == "http" and url.hostname not in LOOPBACK_HOSTS:
                raise ValueError(f"{value!r} needs https: only loopback addresses may go without")
        return values


class OAuthSettings(Area):
    """Sign-in for other programs."""

    clients: dict[str, OAuthClient] = {}
    """By client id."""
    access_token_s: int = Field(3600, gt=0)
    refresh_token_s: int = Field(30 * 24 * 3600, gt=0)
    """How long a client that does nothing stays signed in; each refresh starts it again."""


class S3Settings(Area):
    """An S3-compatible server for uploaded files."""

    bucket: str | None = None
    """Naming a bucket turns S3 on; it has to exist."""
    endpoint_url: str | None = None
    """Default: Amazon's."""
    public_endpoint_url: str | None = None
    """The same server as clients reach it, when that is another address."""
    region: str = "us-east-1"
    path_style: bool = False
    """The bucket in the path instead of the host name, as most servers other than Amazon's want it."""
    access_key_id: str | None = None
    """Default: what the AWS SDK finds by itself (environment, profile, instance role)."""
    secret_access_key: SecretStr | None = None
    secret_access_key_file: Path | None = None
    encryption: Literal["AES256", "aws:kms"] | None = None
    """Server-side encryption that every upload asks for; None leaves it to the bucket."""
    kms_key_id: str | None = None

    def secret(self) -> str | None:
        """The secret key from the settings or its file."""
        if self.secret_access_key is not None:
            return self.secret_access_key.get_secret_value()
        if self.secret_access_key_file is not None:
            return self.secret_access_key_file.read_text("utf-8").strip()
        return None


class ObjectSettings(Area):
    """Uploaded files: in the data folder, or on S3."""

    folder: str = Field("tasks/artifacts", pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$")
    """Begins the storage path of every artifact."""
    cors_origins: list[str] = ["*"]
    """Web pages that may use links to uploads, downloads and logs. The links are secrets in themselves."""
    s3: S3Settings = S3Settings()


class LogSettings(Area):
    """What becomes of the records of runs."""

    archive_after_s: float = Field(3600, gt=0)
    """So long after its end, a run's record moves from the database into one compressed object."""
    keep_days: int | None = Field(None, gt=0)
    """Records of tasks on which nothing happened for so many days are removed; default: never."""


class WorkerSettings(Area):
    concurrency: int = Field(8, gt=0)
    """Runs that one worker drives at once; more wait in the queue."""
    drain_s: float = Field(10, ge=0)
    """How long a stopping worker lets live runs finish."""
    min_free_mb: int = Field(200, ge=0)
    """With less space than this on the disk of its data folder, a worker takes no further runs."""
    name: str | None = Field(None, min_length=1, max_length=100)
    """As `taskyard admin workers` shows it; default: the host's name."""
    pools: list[Pool] = Field(["default"], min_length=1)
    """Takes only runs whose sandbox environment asks for one of these; `default` are those that ask for none."""


class Settings(BaseSettings):
    """All settings of one process."""

    model_config = SettingsConfigDict(
        env_prefix="TASKYARD_",
        env_nested_delimiter="__",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
    )

    data_dir: Path = Field(default_factory=lambda: default_data_dir())  # noqa: PLW0108 - it is defined below
    database_url: SecretStr | None = None
    base_url: str | None = None
    """Absolute URL under which clients reach the server; default: what the request says."""
    cors_origins: list[str] = []
    """Web pages of other origins that may call the API, with a key or token of their own: cookies do not count there.
    `*` is every one."""
    secret_keys: list[SecretStr] = []
    """Encrypt stored secrets: 32 bytes in base64 each; the first encrypts, all decrypt. Default: a key file in the
    data folder. Several machines need this setting, and the same value."""
    trusted_domains: list[str] | None = None
    """Replaces the built-in list of domains that the network level `trusted` stands for."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"
    runs: RunSettings = RunSettings()
    sandbox: SandboxSettings = SandboxSettings()
    models: ModelSettings = ModelSettings()
    network: NetworkSettings = NetworkSettings()
    git: GitSettings = GitSettings()
    budget: BudgetSettings = BudgetSettings()
    agents: dict[str, AgentSettings] = {}
    tasks: TaskSettings = TaskSettings()
    objects: ObjectSettings = ObjectSettings()
    rate_limits: RateLimitSettings = RateLimitSettings()
    sessions: SessionSettings = SessionSettings()
    oauth: OAuthSettings = OAuthSettings()
    logs: LogSettings = LogSettings()
    worker: WorkerSettings = WorkerSettings()

    @field_validator("base_url")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and (
            urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname
        ):
            raise ValueError("has to be like https://taskyard.example.org")
        return value

    @field_validator("database_url")
    @classmethod
    def _a_libpq_url(cls, value: SecretStr | None) -> SecretStr | None:
        """What libpq says of a wrong one would show the password."""
        if value is not None:
            from psycopg import ProgrammingError
            from psycopg.conninfo import conninfo_to_dict

            try:
                parts = conninfo_to_dict(value.get_secret_value())
            except ProgrammingError:
                parts = {"host": "@"}
            if any("@" in str(parts.get(name, "")) for name in ("host", "port")):
                raise ValueError(
                    "has to be like postgresql://user:password@host:5432/database, "
                    "with special characters of the password in percent encoding (@ is %40)"
                )
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, toml_file=config_file())
        return (init_settings, env_settings, dotenv_settings, toml)


def default_data_dir() -> Path:
    """`/var/lib/taskyard` for root, the user's data folder otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/taskyard")
    return platformdirs.user_data_path("taskyard")


def config_file() -> Path:
    """The TOML file that is read, whether or not it exists."""
    if named := os.environ.get("TASKYARD_CONFIG"):
        return Path(named)
    return Path(os.environ.get("TASKYARD_DATA_DIR") or default_data_dir()) / "taskyard.toml"


def server_secrets(settings: Settings) -> list[str]:
    """Every secret that the server itself has, as far as it can be read: for what must not be shown."""
    found = list(secrets_of(settings))
    for name, variable in KEY_VARIABLES.items():
        upstream: Upstream = getattr(settings.models, name)
        with suppress(OSError, UnicodeDecodeError):  # whoever needs the key says what is wrong with its file
            if key := upstream.key(variable):
                found.append(key)
    return found
