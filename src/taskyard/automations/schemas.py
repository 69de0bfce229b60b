"""Bodies of the automation endpoints (tasks-api §10)."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, StringConstraints
from pydantic_core import PydanticCustomError

from taskyard.automations import schedule
from taskyard.schemas import Body, Filled, NotNull, Title, repository_name


def _cron(value: str) -> str:
    if not schedule.has_five_fields(value):
        raise PydanticCustomError(
            "cron",
            "Only standard 5-field cron expressions are supported (minute hour day month weekday). "
            "Example: '0 9 * * 1-5'.",
        )
    if not schedule.is_valid(value):
        raise PydanticCustomError(
            "cron", "Invalid cron expression. Use standard 5-field cron syntax (e.g., '0 9 * * 1-5')."
        )
    return value


def _timezone(value: str) -> str:
    if not schedule.is_timezone(value):
        raise PydanticCustomError("timezone", "'{name}' is not a valid IANA timezone.", {"name": value})
    return value


Name = Annotated[Filled, StringConstraints(max_length=255)]
Repository = Annotated[Filled, StringConstraints(max_length=255), AfterValidator(repository_name)]
Cron = Annotated[Filled, StringConstraints(max_length=100), AfterValidator(_cron)]
Timezone = Annotated[Filled, AfterValidator(_timezone)]


class AutomationUpdate(Body):
    """PATCH: what is not sent stays as it is."""

    name: Annotated[Name | None, NotNull] = None
    prompt: Annotated[Filled | None, NotNull] = None
    repository: Annotated[Repository | None, NotNull] = None
    github_integration: int | None = None
    cron_expression: Annotated[Cron | None, NotNull] = None
    timezone: Timezone = "UTC"
    template_id: Title | None = None
    enabled: bool = True


class AutomationWrite(AutomationUpdate):
    """POST and PUT: these four have to be sent."""

    name: Name
    prompt: Filled
    repository: Repository
    cron_expression: Cron


class NoBody(Body):
    """`POST …/run/` takes nothing, but what is sent has to be a JSON object."""
