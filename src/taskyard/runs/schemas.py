"""Bodies of the run endpoints (tasks-api §4.8, §5, §6.6)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import Field, StringConstraints

from taskyard.schemas import Body, Filled, NotNull, Text


class Status(StrEnum):
    NOT_STARTED = "not_started"
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({"completed", "failed", "cancelled"})


class Mode(StrEnum):
    INTERACTIVE = "interactive"
    BACKGROUND = "background"


class Authorship(StrEnum):
    USER = "user"
    BOT = "bot"


class Source(StrEnum):
    MANUAL = "manual"
    SIGNAL_REPORT = "signal_report"


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


class RunTask(Body):
    """`POST T/run/`: an empty body is fine."""

    mode: Mode = Mode.BACKGROUND
    branch: Annotated[Filled, StringConstraints(max_length=255)] | None = None
    resume_from_run_id: Annotated[UUID | None, NotNull] = None
    pending_user_message: Annotated[Text | None, NotNull] = None
    pending_user_artifact_ids: list[Annotated[str, StringConstraints(max_length=128)]] = Field(
        default_factory=list
    )
    sandbox_environment_id: Annotated[UUID | None, NotNull] = None
    pr_authorship_mode: Annotated[Authorship | None, NotNull] = None
    run_source: Annotated[Source | None, NotNull] = None
    signal_report_id: Annotated[Filled | None, NotNull] = None
    runtime_adapter: Annotated[RuntimeAdapter | None, NotNull] = None
    model: Annotated[Filled | None, NotNull] = None
    reasoning_effort: Annotated[Effort | None, NotNull] = None
    github_user_token: Annotated[Filled | None, NotNull] = None
    initial_permission_mode: Annotated[PermissionMode | None, NotNull] = None
    agent: Annotated[Filled | None, NotNull] = None
    """Addition of ours: the name of a configured agent other than claude and codex."""


class RunUpdate(Body):
    """`PATCH R/`: for now the status alone."""

    status: Annotated[Status | None, NotNull] = None
    error_message: Text | None = None
