"""The operations of sandbox environments, automations and repositories."""

from __future__ import annotations

from taskyard.automations.schemas import AutomationUpdate, AutomationWrite, NoBody
from taskyard.environments.mcp import McpServer
from taskyard.environments.schemas import EnvironmentCreate, EnvironmentUpdate
from taskyard.forge.api import Register
from taskyard.openapi import shapes
from taskyard.openapi.operation import PROJECT, Answer, Operation, Request, page_parameters
from taskyard.schemas import Body

ENVIRONMENTS = PROJECT + "sandbox_environments/"
AUTOMATIONS = PROJECT + "task_automations/"
NIGHTLY = {
    "name": "Nightly clean-up",
    "prompt": "Remove dead code.",
    "repository": "acme/shop",
    "cron_expression": "0 3 * * 1-5",
    "timezone": "Europe/Berlin",
}

PARTS: dict[type[Body], str] = {McpServer: "SandboxMcpServerRequest"}

OPERATIONS = (
    Operation(
        "sandbox_environments_list",
        "GET",
        ENVIRONMENTS,
        "List sandbox environments",
        "task:read",
        {200: Answer(shapes.PaginatedSandboxEnvironmentList)},
        query=page_parameters(),
    ),
    Operation(
        "sandbox_environments_create",
        "POST",
        ENVIRONMENTS,
        "Create a sandbox environment",
        "task:write",
        {201: Answer(shapes.SandboxEnvironment)},
        Request(
            "SandboxEnvironmentRequest",
            EnvironmentCreate,
            parts=PARTS,
            example={"name": "Staging", "environment_variables": {"API_URL": "https://staging.example.org"}},
        ),
    ),
    Operation(
        "sandbox_environments_retrieve",
        "GET",
        ENVIRONMENTS + "{id}/",
        "Get a sandbox environment",
        "task:read",
        {200: Answer(shapes.SandboxEnvironment)},
    ),
    Operation(
        "sandbox_environments_partial_update",
        "PATCH",
        ENVIRONMENTS + "{id}/",
        "Change a sandbox environment",
        "task:write",
        {200: Answer(shapes.SandboxEnvironment)},
        Request(
            "PatchedSandboxEnvironment",
            EnvironmentUpdate,
            required=False,
            parts=PARTS,
            example={"private": False},
        ),
        text="`environment_variables` replaces all of them.",
    ),
    Operation(
        "sandbox_environments_destroy",
        "DELETE",
        ENVIRONMENTS + "{id}/",
        "Delete a sandbox environment",
        "task:write",
        {204: Answer(media=None)},
    ),
    Operation(
        "task_automations_list",
        "GET",
        AUTOMATIONS,
        "List automations, by title",
        "task:read",
        {200: Answer(shapes.PaginatedTaskAutomationList)},
        query=page_parameters(),
    ),
    Operation(
        "task_automations_create",
        "POST",
        AUTOMATIONS,
        "Create an automation",
        "task:write",
        {201: Answer(shapes.TaskAutomation)},
        Request("TaskAutomationRequest", AutomationWrite, example=NIGHTLY),
        text="With it a task is created that is run at these times.",
    ),
    Operation(
        "task_automations_retrieve",
        "GET",
        AUTOMATIONS + "{id}/",
        "Get an automation",
        "task:read",
        {200: Answer(shapes.TaskAutomation)},
    ),
    Operation(
        "task_automations_update",
        "PUT",
        AUTOMATIONS + "{id}/",
        "Change an automation",
        "task:write",
        {200: Answer(shapes.TaskAutomation)},
        Request("TaskAutomationRequest", AutomationWrite, example=NIGHTLY),
        text="The required fields have to be sent; what else is not sent stays as it is.",
    ),
    Operation(
        "task_automations_partial_update",
        "PATCH",
        AUTOMATIONS + "{id}/",
        "Change fields of an automation",
        "task:write",
        {200: Answer(shapes.TaskAutomation)},
        Request("PatchedTaskAutomation", AutomationUpdate, required=False, example={"enabled": False}),
    ),
    Operation(
        "task_automations_destroy",
        "DELETE",
        AUTOMATIONS + "{id}/",
        "Delete an automation",
        "task:write",
        {204: Answer(media=None)},
        text="Its task stays.",
    ),
    Operation(
        "task_automations_run_create",
        "POST",
        AUTOMATIONS + "{id}/run/",
        "Run an automation now",
        "task:write",
        {200: Answer(shapes.TaskAutomation)},
        Request("TaskAutomationRunRequest", NoBody, required=False, example={}),
    ),
    Operation(
        "repositories_create",
        "POST",
        PROJECT + "repositories/",
        "Name a git repository for tasks",
        "task:write",
        {
            200: Answer(shapes.Repository, text="It had a name."),
            201: Answer(shapes.Repository, text="It has a new name."),
        },
        Request("RepositoryRequest", Register, example={"origin": "https://git.example.org/acme/shop.git"}),
        text="A path on the server's own disk needs a user who administers it.",
    ),
)
