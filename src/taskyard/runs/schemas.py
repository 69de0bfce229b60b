"""Bodies of the run endpoints (tasks-api §4.8, §5, §6.6)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from taskyard.schemas import Body, Filled, NotNull, Text, an_object
from taskyard.tasks.schemas import RunStatus

TERMINAL = frozenset({"completed", "failed", "cancelled"})


PENDING_KEYS = ("pending_user_message", "pending_user_artifact_ids", "pending_user_message_ts")
"""Keys of `state` that hold the first message; whoever delivers it removes them."""


class Environment(StrEnum):
    LOCAL = "local"
    CLOUD = "cloud"


class Mode(StrEnum):
    INTERACTIVE = "interactive"
    BACKGROUND = "background"


class Authorship(StrEnum):
    USER = "user"
    BOT = "bot"


class Source(StrEnum):
    MANUAL = "manual"
    SIGNAL_REPORT = "signal_report"
    AGENT = "agent"
    """Sent by newer clients."""


class RuntimeAdapter(StrEnum):
    CLAUDE = "claude"
    CODEX = "codex"


class Effort(StrEnum):
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    XHIGH = "xhigh"
    MAX = "max"


class PermissionMode(StrEnum):
    DEFAULT = "default"
    ACCEPT_EDITS = "acceptEdits"
    PLAN = "plan"
    BYPASS_PERMISSIONS = "bypassPermissions"
    AUTO = "auto"
    READ_ONLY = "read-only"
    FULL_ACCESS = "full-access"


def _some_entries(value: list[Any]) -> list[Any]:
    if not value:
        raise PydanticCustomError("entries", "At least one log entry is required")
    return value


Opaque = Annotated[Any, AfterValidator(an_object)]
"""An object that is not looked into: keys and texts stay as they came."""
ArtifactIds = list[Annotated[Filled, StringConstraints(max_length=128)]]


class RunFields(Body):
    """What both ways to make a run take."""

    mode: Mode = Mode.BACKGROUND
    branch: Annotated[Filled, StringConstraints(max_length=255)] | None = None
    sandbox_environment_id: Annotated[UUID | None, NotNull] = None
    pr_authorship_mode: Annotated[Authorship | None, NotNull] = None
    run_source: Annotated[Source | None, NotNull] = None
    signal_report_id: Annotated[Filled | None, NotNull] = None
    runtime_adapter: Annotated[RuntimeAdapter | None, NotNull] = None
    model: Annotated[Filled | None, NotNull] = None
    reasoning_effort: Annotated[Effort | None, NotNull] = None
    github_user_token: Annotated[Filled | None, NotNull] = Field(default=None, repr=False)
    initial_permission_mode: Annotated[PermissionMode | None, NotNull] = None
    # From here on additions of ours.
    agent: Annotated[Filled | None, NotNull] = Field(
        default=None, description="The name of a configured agent other than `claude` and `codex`."
    )
    priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Of the waiting runs of a project, the one with the highest gets a worker first. Only admins of the"
        " project may ask for more than 0.",
    )
    budget_cost: Annotated[float | None, NotNull] = Field(
        default=None,
        gt=0,
        le=1_000_000,
        allow_inf_nan=False,
        description="US dollars that the run may spend on models. A run that resumes this one has the same limit,"
        " unless it names another.",
    )
    budget_tokens: Annotated[int | None, NotNull] = Field(
        default=None,
        gt=0,
        le=10**15,
        description="Tokens that the run may use, those read from a cache not counted; inherited like `budget_cost`.",
    )
    allowed_models: Annotated[list[Filled] | None, NotNull] = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="The models that the run may use, `*` for any characters; inherited like `budget_cost`.",
    )


class RunTask(RunFields):
    """`POST T/run/`: an empty body is fine."""

    resume_from_run_id: Annotated[UUID | None, NotNull] = None
    pending_user_message: Annotated[Text | None, NotNull] = None
    pending_user_artifact_ids: ArtifactIds = Field(default_factory=list)


class RunCreate(RunFields):
    """`POST T/runs/`: a run that nothing starts."""

    environment: Environment = Environment.LOCAL


class RunStart(Body):
    """`POST R/start/`."""

    pending_user_message: Annotated[Text | None, NotNull] = None
    pending_user_artifact_ids: ArtifactIds = Field(default_factory=list)


class RunUpdate(Body):
    """`PATCH R/` (§5.4): what is not sent stays as it is."""

    status: Annotated[RunStatus | None, NotNull] = None
    branch: Annotated[Filled, StringConstraints(max_length=255)] | None = None
    stage: Annotated[Filled, StringConstraints(max_length=100)] | None = None
    output: Any = None
    state: Annotated[Any, NotNull] = None
    state_remove_keys: list[Filled] = Field(default_factory=list, min_length=1)
    error_message: Text | None = None
    environment: Annotated[Literal["local"] | None, NotNull] = None
    """Only to `local`: the hand-off of a cloud run to its client."""


class SetOutput(Body):
    """`PATCH R/set_output/` (§5.5)."""

    output: Any


class AppendLog(Body):
    """`POST R/append_log/` (§6.1)."""

    opaque = True
    entries: Annotated[list[Opaque], AfterValidator(_some_entries)]


class RelayMessage(Body):
    """`POST R/relay_message/` (§6.7)."""

    text: Annotated[Filled, StringConstraints(max_length=10_000)]
