"""What schemathesis has to know of this API besides its description. Loaded by `test_fuzz.py`'s processes."""

from __future__ import annotations

from typing import Any

import schemathesis

RUNS = "/api/projects/{project_id}/tasks/{task_id}/runs/"
NAMING = {
    *("github_integration", "github_user_integration", "signal_report", "signal_report_task_relationship"),
    *(
        "repository",
        "json_schema",
        "resume_from_run_id",
        "pending_user_artifact_ids",
        "sandbox_environment_id",
    ),
    *("agent", "runtime_adapter", "model", "reasoning_effort", "initial_permission_mode", "priority"),
}
"""Fields that name something, so that made-up values are nearly always refused."""
CREATING = ("/tasks/", "/run/", "/runs/")
LITERAL = {"summaries", "repositories", "@current", "@me"}


@schemathesis.serializer("application/x-ndjson")
def lines(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Two of three bodies that create something name nothing else, so that there is something to go on with."""
    creates = context.operation.method.upper() == "POST" and context.operation.path.endswith(CREATING)
    if not creates or not isinstance(body, dict) or len(repr(body)) % 3 == 0:
        return body
    return {name: value for name, value in body.items() if name not in NAMING}


@schemathesis.hook
def map_headers(context: Any, headers: Any) -> Any:
    """Half of the requests have no key: one that was used for another request is refused."""
    if headers and len(headers.get("Idempotency-Key", "")) % 2:
        return {name: value for name, value in headers.items() if name != "Idempotency-Key"}
    return headers


@schemathesis.hook
def filter_failure(_: Any, failure: Any, case: Any, response: Any) -> bool:
    """An id that is a word of the API leads to another operation, as the description has it.

    Runs of a deleted task stay readable, so that their agents can finish (tasks-api §4.5).
    """
    if type(failure).__name__ == "UseAfterFree" and case.operation.path.startswith(RUNS):
        return False
    return not LITERAL & {str(value) for value in (case.path_parameters or {}).values()}
