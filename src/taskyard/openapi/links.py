"""Links of the description: what the answer of one operation is good for in others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from taskyard.openapi.operation import PROJECT, RUN, TASK, Json, Operation

ID = "$response.body#/id"
ONE_TASK = TASK.replace("{task_id}", "{id}")

SOURCES: Mapping[tuple[str, int], Mapping[str, Mapping[str, str]]] = {
    ("tasks_create", 201): {ONE_TASK: {"id": ID}, TASK + "runs/": {"task_id": ID}},
    ("tasks_run_create", 200): {RUN: {"task_id": ID, "id": "$response.body#/latest_run/id"}},
    ("tasks_runs_create", 201): {RUN: {"task_id": "$response.body#/task", "id": ID}},
    ("sandbox_environments_create", 201): {PROJECT + "sandbox_environments/{id}/": {"id": ID}},
    ("task_automations_create", 201): {PROJECT + "task_automations/{id}/": {"id": ID}},
}
"""For an answer: beginnings of paths, and where in the answer their parameters are."""


def links(operation: Operation, status: int, operations: Iterable[Operation]) -> Json:
    """The links of one answer by name."""
    made: Json = {}
    for begin, where in SOURCES.get((operation.id, status), {}).items():
        for target in operations:
            rest = target.path.removeprefix(begin)
            if target.path.startswith(begin) and "{" not in rest:
                parameters = {"project_id": "$request.path.project_id", **where}
                made[target.id] = {"operationId": target.id, "parameters": parameters}
    return made
