"""Conditions on tasks as SQL, on a row `t` of `tasks` or, but for the stage, of a tally.

The one place that scopes tasks to a project and to whom they are visible.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, LiteralString

from taskyard.accounts.caller import Caller
from taskyard.tasks.schemas import Narrowing, Shown, TaskQuery

Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Where:
    """Conditions, and the values of their parameters."""

    sql: LiteralString
    parameters: Parameters
    filters: int = 0
    """How many filters it has besides the usual ones of a list."""
    repository: bool = False
    """Whether one is about the repository, which only `repository_tally` knows."""
    stage: bool = False
    """Whether one is about runs, which no tally knows."""

    @property
    def prepare(self) -> bool | None:
        """For `execute`: False where a plan must know the values, as they differ too much in how many they leave."""
        return False if self.stage or self.filters > 1 else None


READABLE: LiteralString = "t.project_id = %(project)s AND t.deleted_at IS NULL"
OWN: LiteralString = (
    " AND (t.created_by_id = %(viewer)s OR t.created_by_id IS NULL"
    " OR t.origin_product IN ('signal_report', 'signals_scout', 'onboarding', 'hogdesk'))"
)
"""What remains with `tasks.visibility` = `creator`: own tasks, nobody's, and those of team-wide origins."""


def of_project(project_id: int) -> Where:
    """All tasks of a project."""
    return Where(READABLE, {"project": project_id})


def readable(caller: Caller) -> Where:
    """The tasks that a caller may see (tasks-api §4.1)."""
    if caller.sees_all:
        return of_project(caller.project.id)
    return Where(READABLE + OWN, {"project": caller.project.id, "viewer": caller.user_id})


def narrowed(caller: Caller, query: Narrowing) -> Where:
    """The visible tasks that the narrowing parameters leave."""
    scope = readable(caller)
    parts: list[LiteralString] = [scope.sql]
    parameters = {**scope.parameters}
    if query.origin_product is not None:
        parts.append("t.origin_product = %(origin_product)s")
        parameters["origin_product"] = query.origin_product
    if query.organization is not None:
        parts.append("split_part(t.repository, '/', 1) = %(organization)s")
        parameters["organization"] = query.organization.lower()
    if query.repository is not None:
        whole = "/" in query.repository
        parts.append(
            "t.repository = %(repository)s" if whole else "split_part(t.repository, '/', 2) = %(repository)s"
        )
        parameters["repository"] = query.repository.lower()
    if query.created_by is not None:
        parts.append("t.created_by_id = %(created_by)s")
        parameters["created_by"] = query.created_by if 0 < query.created_by < 2**31 else 0
    if query.stage is not None:
        parts.append(
            "EXISTS (SELECT FROM runs s WHERE s.project_id = %(project)s AND s.stage = %(stage)s"
            " AND s.task_id = t.id)"
        )
        parameters["stage"] = query.stage
    return Where(
        " AND ".join(parts),
        parameters,
        filters=len(parts) - 1,
        repository=query.repository is not None or query.organization is not None,
        stage=query.stage is not None,
    )


def listed(caller: Caller, query: TaskQuery) -> Where:
    """The tasks of a list, whatever it searches for."""
    narrow = narrowed(caller, query)
    parts: list[LiteralString] = [narrow.sql]
    parameters = narrow.parameters
    if query.internal != Shown.ALL:
        parts.append("t.internal" if query.internal == Shown.ONLY else "NOT t.internal")
    if query.archived != Shown.ALL:
        parts.append("t.archived" if query.archived == Shown.ONLY else "NOT t.archived")
    if query.status is not None:
        parts.append("t.latest_status = %(status)s")
        parameters["status"] = query.status
    filters = narrow.filters + (query.status is not None)
    return replace(narrow, sql=" AND ".join(parts), filters=filters)
