"""What answers look like. For the description only: answers are made by the `present.py` of each room.

A field is always there, unless its type has `UnsetType`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType

from taskyard.environments.schemas import NetworkAccess
from taskyard.runs.schemas import Effort, Environment, RuntimeAdapter
from taskyard.tasks.schemas import OriginProduct, RunStatus

Uri = Annotated[str, Meta(extra_json_schema={"format": "uri"})]
AnyJson = Annotated[Any, Meta(description="Any JSON value.")]
Number = Annotated[int, Meta(ge=0)]
Time = Annotated[datetime, Meta(tz=True)]
STATE = (
    "An object, unless a client made it something else. Keys of the server's own: `queue`, while the run waits for a"
    " worker (only an answer about this run alone has it): its `position` in the project, from 1, and the `reason`;"
    " `suspended`, true while it sleeps until the next message; `cost`, the US dollars spent on models, and"
    " `token_usage`; `error_type`, a stable name of why it failed; `priority`, `budget_cost`, `budget_tokens` and"
    " `allowed_models`, as they were asked for."
)
Role = Literal["engineering", "data", "product", "founder", "leadership", "marketing", "sales", "other", ""]


class Shape(Struct, forbid_unknown_fields=True):
    """The base of all shapes: keys that it does not name do not occur."""


# Errors ------------------------------------------------------------------------------------------------------


class Error(Shape):
    """The answer to a refused request."""

    type: Literal[
        "validation_error", "authentication_error", "invalid_request", "throttled_error", "server_error"
    ]
    code: Annotated[str, Meta(description="A stable name of the reason.", examples=["required", "not_found"])]
    detail: Annotated[str, Meta(description="The reason for people.")]
    attr: Annotated[str | None, Meta(description="The field; nested ones are joined by `__`.")]


class ErrorResponse(Shape):
    """Some refusals say no more than this."""

    error: str


class TaskRunErrorResponse(Shape):
    """Refusals about runs: the four keys of `Error`, or `error`, or `detail` alone."""

    detail: str | UnsetType = UNSET
    error: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    code: str | UnsetType = UNSET
    attr: str | UnsetType | None = UNSET
    missing_artifact_ids: list[str] | UnsetType = UNSET


class OAuthError(Shape):
    """A refusal as OAuth 2 has it (RFC 6749 §5.2)."""

    error: str
    error_description: str | UnsetType = UNSET


class EventStreamError(Shape):
    """Where an upload of events has to go on."""

    error: str
    last_accepted_seq: Number


# Tasks -------------------------------------------------------------------------------------------------------


class UserBasic(Shape):
    """A user, in short."""

    id: int
    uuid: UUID
    distinct_id: str | None
    first_name: str
    last_name: str
    email: str
    is_email_verified: bool | None
    hedgehog_config: dict[str, Any] | None
    role_at_organization: Role | None


class TaskRunArtifactResponse(Shape):
    """A file of a run, or one that waits for a run."""

    name: str
    type: str
    storage_path: str
    uploaded_at: Time
    id: str | UnsetType = UNSET
    source: str | UnsetType = UNSET
    size: Number | UnsetType = UNSET
    content_type: str | UnsetType = UNSET


class TaskRunDetail(Shape):
    """One attempt at a task."""

    id: UUID
    task: UUID
    stage: str | None
    branch: str | None
    status: RunStatus
    environment: Environment
    runtime_adapter: RuntimeAdapter | None
    provider: Literal["anthropic", "openai"] | None
    model: str | None
    reasoning_effort: Effort | None
    log_url: Annotated[Uri | None, Meta(description="The whole log; works without credentials for an hour.")]
    error_message: str | None
    output: AnyJson
    state: Annotated[Any, Meta(description=STATE)]
    artifacts: list[TaskRunArtifactResponse]
    created_at: Time
    updated_at: Time
    completed_at: Time | None


class Task(Shape):
    """A piece of work for an agent."""

    id: UUID
    task_number: int | None
    slug: str
    title: Annotated[str, Meta(max_length=255)]
    title_manually_set: bool
    description: Annotated[str, Meta(description="The first prompt.")]
    origin_product: OriginProduct
    repository: Annotated[str, Meta(max_length=255)] | None
    github_integration: int | None
    github_user_integration: UUID | None
    signal_report: UUID | None
    json_schema: Annotated[Any, Meta(description="The JSON Schema that `output` has to fit, or null.")]
    internal: bool
    latest_run: TaskRunDetail | None
    created_at: Time
    updated_at: Time
    created_by: UserBasic | None
    ci_prompt: str | None
    archived: bool
    archived_at: Time | None


class TaskRunSummary(Shape):
    """The newest run of a task, in short."""

    status: RunStatus | None
    environment: Environment | None


class TaskSummary(Shape):
    """A task, in short."""

    id: UUID
    title: str
    repository: str | None
    created_at: Time
    updated_at: Time
    latest_run: TaskRunSummary | None
    origin_product: OriginProduct


class TaskRepositoriesResponse(Shape):
    """The repositories that tasks name, sorted."""

    repositories: list[str]


class Page(Shape):
    """A part of a list."""

    count: Annotated[Number, Meta(description="How many there are in all.")]
    next: Uri | None
    previous: Uri | None


class PaginatedTaskList(Page):
    results: list[Task]


class PaginatedTaskRunDetailList(Page):
    results: list[TaskRunDetail]


class PaginatedTaskSummaryList(Page):
    results: list[TaskSummary]


# Runs --------------------------------------------------------------------------------------------------------


class TaskRunCommandResponse(Shape):
    """The agent's answer, JSON-RPC 2.0."""

    jsonrpc: Literal["2.0"]
    id: Annotated[str | int | float | UnsetType | None, Meta(description="That of the request.")] = UNSET
    result: AnyJson | UnsetType = UNSET
    error: dict[str, Any] | UnsetType = UNSET


class ConnectionTokenResponse(Shape):
    token: Annotated[str, Meta(description="A JSON Web Token, RS256.")]


class TaskRunRelayMessageResponse(Shape):
    status: Literal["skipped", "accepted"]
    relay_id: str | UnsetType = UNSET


class EventStreamResponse(Shape):
    """What became of an upload of events."""

    accepted: Number
    duplicate: Number
    last_accepted_seq: Number


class S3PresignedPost(Shape):
    """A form: all `fields` first, then the content as the part `file`."""

    url: Uri
    fields: dict[str, str]


class TaskRunArtifactPrepareUploadResponse(Shape):
    """Where a file may be uploaded to."""

    id: str
    name: str
    type: str
    source: str
    size: Number
    content_type: str
    storage_path: str
    expires_in: Number
    presigned_post: S3PresignedPost


class TaskStagedArtifactPrepareUploadResponse(TaskRunArtifactPrepareUploadResponse):
    """Where a file may be uploaded to."""


class TaskRunArtifactsPrepareUploadResponse(Shape):
    artifacts: list[TaskRunArtifactPrepareUploadResponse]


class TaskStagedArtifactsPrepareUploadResponse(Shape):
    artifacts: list[TaskStagedArtifactPrepareUploadResponse]


class TaskRunArtifactsUploadResponse(Shape):
    """The whole manifest of the run, new files last."""

    artifacts: list[TaskRunArtifactResponse]


class TaskRunArtifactsFinalizeUploadResponse(Shape):
    artifacts: list[TaskRunArtifactResponse]


class TaskStagedArtifactsFinalizeUploadResponse(Shape):
    artifacts: list[TaskRunArtifactResponse]


class TaskRunArtifactPresignResponse(Shape):
    url: Uri
    expires_in: Number


# Sandbox environments, automations, repositories -------------------------------------------------------------


class SandboxMcpServer(Shape, omit_defaults=True):
    """An MCP server of an environment: `command`, `args`, `env` for `stdio`; else `url`, `headers`."""

    name: str
    type: Literal["stdio", "http", "sse"]
    command: str | UnsetType = UNSET
    args: list[str] | UnsetType = UNSET
    env: dict[str, str] | UnsetType = UNSET
    url: str | UnsetType = UNSET
    headers: dict[str, str] | UnsetType = UNSET


class SandboxEnvironmentListItem(Shape):
    """A sandbox environment as lists show it."""

    id: UUID
    name: str
    network_access_level: NetworkAccess
    allowed_domains: list[str]
    repositories: list[str]
    private: bool
    worker_pool: Annotated[
        str | None, Meta(description="Only workers of this pool drive its runs; null: those of `default`.")
    ]
    internal: bool
    created_by: UserBasic | None
    created_at: Time
    updated_at: Time


class SandboxEnvironment(SandboxEnvironmentListItem):
    """What sandboxes of runs may reach and know; the values of its variables are never shown."""

    include_default_domains: bool
    has_environment_variables: bool
    setup_script: Annotated[str, Meta(description="Run in the sandbox before the agent starts.")]
    mcp_servers: Annotated[list[SandboxMcpServer], Meta(description="MCP servers for the agent.")]
    image: Annotated[
        str | None, Meta(description="The container image that its sandboxes are made of; null: the site's.")
    ]
    effective_domains: list[str]


class PaginatedSandboxEnvironmentList(Page):
    results: list[SandboxEnvironmentListItem]


class TaskAutomation(Shape):
    """A task that is run by the clock."""

    id: UUID
    name: str
    prompt: str
    repository: str | None
    github_integration: int | None
    cron_expression: str
    timezone: str
    template_id: str | None
    enabled: bool
    last_run_at: Time | None
    last_run_status: Literal["success", "failed", "running"] | None
    last_task_id: UUID
    last_task_run_id: UUID | None
    last_error: str | None
    created_at: Time
    updated_at: Time


class PaginatedTaskAutomationList(Page):
    results: list[TaskAutomation]


class Repository(Shape):
    """A git repository under the name that tasks use."""

    name: str
    origin: str
