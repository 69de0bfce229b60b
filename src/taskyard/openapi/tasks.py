"""The operations of tasks."""

from __future__ import annotations

from taskyard.openapi import shapes
from taskyard.openapi.operation import PROJECT, Answer, Operation, Parameter, Request, page_parameters
from taskyard.runs.schemas import RunTask
from taskyard.tasks.schemas import Presence, RunStatus, Summaries, TaskWrite

TASKS = PROJECT + "tasks/"
ONE = TASKS + "{id}/"
EXAMPLE = {
    "title": "Fix the import",
    "description": "The importer drops the last line of a file that has no newline at its end.",
    "repository": "acme/shop",
}

FILLED = {"type": "string", "minLength": 1}
SHOWN = {"type": "string", "enum": ["true", "false", "all"], "default": "false"}
NARROWING = (
    Parameter("origin_product", FILLED, "Where the task came from. An unknown value matches nothing."),
    Parameter("stage", FILLED, "Tasks with a run in this stage."),
    Parameter("organization", FILLED, "The part of `repository` before the slash."),
    Parameter("repository", FILLED, "`organization/name`, or the name alone."),
    Parameter("created_by", {"type": "integer"}, "The id of a user."),
)
FILTERS = (
    *NARROWING,
    Parameter(
        "search", {"type": "string"}, "A part of title or description, or a task number (`TES-12`, `12`)."
    ),
    Parameter(
        "status", {"type": "string", "enum": [str(value) for value in RunStatus]}, "Of the newest run."
    ),
    Parameter("internal", SHOWN, "Internal tasks: not (`false`), only (`true`), or too (`all`)."),
    Parameter("archived", SHOWN, "Archived tasks: not (`false`), only (`true`), or too (`all`)."),
)

OPERATIONS = (
    Operation(
        "tasks_list",
        "GET",
        TASKS,
        "List tasks, newest first",
        "task:read",
        {200: Answer(shapes.PaginatedTaskList)},
        query=(*FILTERS, *page_parameters()),
    ),
    Operation(
        "tasks_create",
        "POST",
        TASKS,
        "Create a task",
        "task:write",
        {201: Answer(shapes.Task)},
        Request("TaskRequest", TaskWrite, required=False, example=EXAMPLE),
        text="Nothing is started. Without a title one is made of the description.",
    ),
    Operation(
        "tasks_repositories_retrieve",
        "GET",
        TASKS + "repositories/",
        "List the repositories of tasks",
        "task:read",
        {200: Answer(shapes.TaskRepositoriesResponse)},
    ),
    Operation(
        "tasks_summaries_create",
        "POST",
        TASKS + "summaries/",
        "Get many tasks in short",
        "task:read",
        {200: Answer(shapes.PaginatedTaskSummaryList)},
        Request("TaskSummariesRequest", Summaries, example={"ids": ["6f1c7f3e-5a77-4d7b-9d0e-0b8f5a3c1e11"]}),
        query=page_parameters(),
        text="Ids that name no visible task are left out.",
    ),
    Operation(
        "tasks_retrieve",
        "GET",
        ONE,
        "Get a task",
        "task:read",
        {200: Answer(shapes.Task)},
        query=NARROWING,
    ),
    Operation(
        "tasks_update",
        "PUT",
        ONE,
        "Change a task",
        "task:write",
        {200: Answer(shapes.Task)},
        Request("TaskRequest", TaskWrite, required=False, example=EXAMPLE),
        query=NARROWING,
        text="The same as PATCH: what is not sent stays as it is.",
    ),
    Operation(
        "tasks_partial_update",
        "PATCH",
        ONE,
        "Change fields of a task",
        "task:write",
        {200: Answer(shapes.Task)},
        Request("PatchedTask", TaskWrite, required=False, example={"title": "Fix the import of old files"}),
        query=NARROWING,
        text="What is not sent stays as it is. A run that is under way is not touched.",
    ),
    Operation(
        "tasks_destroy",
        "DELETE",
        ONE,
        "Delete a task",
        "task:write",
        {204: Answer(media=None)},
        query=NARROWING,
        text="Runs that are under way go on.",
    ),
    Operation(
        "tasks_presence_create",
        "POST",
        ONE + "presence/",
        "Say that a device looks at a task",
        "task:write",
        {204: Answer(media=None)},
        Request("TaskPresenceRequest", Presence, required=False, example={"device_id": "phone"}),
        text="For clients that would get push messages else. There are none, so nothing is kept.",
    ),
    Operation(
        "tasks_presence_destroy",
        "DELETE",
        ONE + "presence/",
        "Say that a device no longer looks at a task",
        "task:write",
        {204: Answer(media=None)},
    ),
    Operation(
        "tasks_run_create",
        "POST",
        ONE + "run/",
        "Run a task",
        "task:write",
        {200: Answer(shapes.Task, text="The task; `latest_run` is the new run.")},
        Request(
            "TaskRunCreateRequestSchema",
            RunTask,
            required=False,
            example={"mode": "interactive", "branch": "main"},
        ),
        text="Creates a run and starts it. Each request makes another run, unless it has an `Idempotency-Key`.",
        otherwise={400: shapes.TaskRunErrorResponse},
    ),
)
