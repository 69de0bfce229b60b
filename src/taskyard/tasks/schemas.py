"""Bodies of the task endpoints (tasks-api §2, §4)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from taskyard.schemas import Body, Filled, Text, Title, repository_name


class OriginProduct(StrEnum):
    """Where a task came from (§2.1): the values of the contract, old and new."""

    ERROR_TRACKING = "error_tracking"
    EVAL_CLUSTERS = "eval_clusters"
    USER_CREATED = "user_created"
    AUTOMATION = "automation"
    SLACK = "slack"
    SUPPORT_QUEUE = "support_queue"
    SESSION_SUMMARIES = "session_summaries"
    SIGNAL_REPORT = "signal_report"
    POSTHOG_AI = "posthog_ai"
    EXPERIMENTS = "experiments"
    SIGNALS_SCOUT = "signals_scout"
    SUPPORT_REPLY = "support_reply"
    ONBOARDING = "onboarding"
    HOGDESK = "hogdesk"
    IMAGE_BUILDER = "image_builder"
    REVIEW_HOG = "review_hog"
    LOOP = "loop"
    MCP_ANALYTICS = "mcp_analytics"
    WORKFLOW = "workflow"
    SIGNALS_CHAT = "signals_chat"


class RunStatus(StrEnum):
    NOT_STARTED = "not_started"
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Relationship(StrEnum):
    IMPLEMENTATION = "implementation"


def _json_schema(value: Any) -> Any:
    if value is not None and not isinstance(value, dict):
        raise PydanticCustomError("json_schema", "json_schema must be a JSON Schema object.")
    return value


class TaskWrite(Body):
    """Create and update: nothing is required, what is not sent stays as it is."""

    title: Title = ""
    title_manually_set: bool = False
    description: Text = ""
    origin_product: OriginProduct = OriginProduct.USER_CREATED
    repository: Annotated[Title | None, AfterValidator(repository_name)] = None
    github_integration: int | None = None
    github_user_integration: UUID | None = None
    signal_report: UUID | None = None
    signal_report_task_relationship: Relationship | None = None
    json_schema: Annotated[Any, AfterValidator(_json_schema)] = None
    internal: bool = False
    ci_prompt: Text | None = Field(default=None)
    archived: bool = False


class Shown(StrEnum):
    """What a list does with a kind of tasks that is usually hidden."""

    HIDDEN = "false"
    ONLY = "true"
    ALL = "all"


def _flag(value: Any) -> Any:
    """`true`, `false` or `all` in a query, as clients of different ages write them."""
    text = value.lower() if isinstance(value, str) else value
    if text in ("true", "t", "yes", "y", "on", "1"):
        return Shown.ONLY
    if text in ("false", "f", "no", "n", "off", "0", ""):
        return Shown.HIDDEN
    if text == "all":
        return Shown.ALL
    raise PydanticCustomError("bool_parsing", "Must be a valid boolean.")


class Narrowing(Body):
    """Query parameters that narrow the list, and also what retrieve, update and delete find (§4.1)."""

    origin_product: Filled | None = None
    """Not one of the enumeration: an unknown one matches nothing."""
    stage: Filled | None = None
    organization: Filled | None = None
    repository: Filled | None = None
    created_by: int | None = None


class TaskQuery(Narrowing):
    """Query parameters of the list (§4.1)."""

    search: str = ""
    status: RunStatus | None = None
    internal: Annotated[Shown, BeforeValidator(_flag)] = Shown.HIDDEN
    archived: Annotated[Shown, BeforeValidator(_flag)] = Shown.HIDDEN


class Summaries(Body):
    """The tasks that `summaries/` is asked for (§4.7)."""

    ids: Annotated[list[UUID], Field(min_length=1, max_length=5000)]


class Presence(Body):
    """`POST` and `DELETE T/presence/` (§4.12): which device looks at the task."""

    device_id: Text = ""
