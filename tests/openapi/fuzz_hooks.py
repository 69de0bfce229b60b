"""What schemathesis has to know of this API besides its description. Loaded by `test_fuzz.py`'s processes."""

from __future__ import annotations

from typing import Any

import schemathesis

RUNS = "/api/projects/{project_id}/tasks/{task_id}/runs/"
LITERAL = {"summaries", "repositories", "@current", "@me"}


@schemathesis.serializer("application/x-ndjson")
def lines(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@schemathesis.hook
def filter_failure(_: Any, failure: Any, case: Any, response: Any) -> bool:
    """An id that is a word of the API leads to another operation, as the description has it.

    Runs of a deleted task stay readable, so that their agents can finish (tasks-api §4.5).
    """
    if type(failure).__name__ == "UseAfterFree" and case.operation.path.startswith(RUNS):
        return False
    return not LITERAL & {str(value) for value in (case.path_parameters or {}).values()}
