"""The operations of runs."""

from __future__ import annotations

from taskyard.commands.schemas import Command
from taskyard.events.ingest import LINE_BYTES, REQUEST_BYTES, REQUEST_EVENTS
from taskyard.openapi import shapes
from taskyard.openapi.operation import RUN, TASK, Answer, Operation, Parameter, Request, page_parameters
from taskyard.runs.log_query import DEFAULT_LIMIT, MAX_LIMIT, MAX_OFFSET
from taskyard.runs.schemas import AppendLog, RelayMessage, RunCreate, RunStart, RunUpdate, SetOutput

TIMING = {"Server-Timing": "How long the server worked before the body."}
COUNTS = {
    "X-Total-Count": "How many entries the log has.",
    "X-Filtered-Count": "How many of them match.",
    "X-Matching-Count": "The same.",
    "X-Has-More": "Whether there are more than this page: `true` or `false`.",
}
NAMES = {"type": "string", "minLength": 1}
LAST_EVENT_ID = Parameter(
    "Last-Event-ID", {"type": "string"}, "The `id` of the last event that was seen.", where="header"
)

OPERATIONS = (
    Operation(
        "tasks_runs_list",
        "GET",
        TASK + "runs/",
        "List the runs of a task, newest first",
        "task:read",
        {200: Answer(shapes.PaginatedTaskRunDetailList)},
        query=page_parameters(),
    ),
    Operation(
        "tasks_runs_create",
        "POST",
        TASK + "runs/",
        "Create a run without starting it",
        "task:write",
        {201: Answer(shapes.TaskRunDetail)},
        Request("TaskRunBootstrapCreateRequest", RunCreate, required=False, example={"environment": "cloud"}),
        text="A `local` run is driven by its client; a `cloud` run waits for `start/`.",
        otherwise={400: shapes.TaskRunErrorResponse},
    ),
    Operation(
        "tasks_runs_retrieve",
        "GET",
        RUN,
        "Get a run",
        "task:read",
        {200: Answer(shapes.TaskRunDetail)},
    ),
    Operation(
        "tasks_runs_partial_update",
        "PATCH",
        RUN,
        "Change a run",
        "task:write",
        {200: Answer(shapes.TaskRunDetail)},
        Request("PatchedTaskRunUpdate", RunUpdate, required=False, example={"status": "cancelled"}),
        text="Objects in `output` and `state` are merged into what is there; `state_remove_keys` are removed first.",
    ),
    Operation(
        "tasks_runs_set_output_partial_update",
        "PATCH",
        RUN + "set_output/",
        "Set the output of a run",
        "task:write",
        {200: Answer(shapes.TaskRunDetail)},
        Request("PatchedTaskRunSetOutputRequest", SetOutput, example={"output": {"answer": 42}}),
        text="Checked against the task's `json_schema` when it has one; then it also completes the run.",
        otherwise={400: shapes.ErrorResponse},
    ),
    Operation(
        "tasks_runs_start_create",
        "POST",
        RUN + "start/",
        "Start a run that was created before",
        "task:write",
        {200: Answer(shapes.Task)},
        Request(
            "TaskRunStartRequest",
            RunStart,
            required=False,
            example={"pending_user_message": "Look at the tests first."},
        ),
        otherwise={400: shapes.TaskRunErrorResponse},
    ),
    Operation(
        "tasks_runs_resume_in_cloud_create",
        "POST",
        RUN + "resume_in_cloud/",
        "Take a local or ended run to the server",
        "task:write",
        {200: Answer(shapes.TaskRunDetail)},
        otherwise={400: shapes.ErrorResponse},
    ),
    Operation(
        "tasks_runs_append_log_create",
        "POST",
        RUN + "append_log/",
        "Append entries to the log of a run",
        "task:write",
        {200: Answer(shapes.TaskRunDetail, headers=TIMING)},
        Request(
            "TaskRunAppendLogRequest",
            AppendLog,
            example={"entries": [{"type": "notification", "notification": {"method": "_posthog/console"}}]},
        ),
    ),
    Operation(
        "tasks_runs_logs_retrieve",
        "GET",
        RUN + "logs/",
        "Read the log of a run and of those that it resumes",
        "task:read",
        {
            200: Answer(
                media="application/jsonl",
                schema={"type": "string"},
                headers=TIMING,
                text="One JSON object a line, oldest first.",
            )
        },
    ),
    Operation(
        "tasks_runs_session_logs_retrieve",
        "GET",
        RUN + "session_logs/",
        "Read a part of the log of a run",
        "task:read",
        {200: Answer(schema={"type": "array", "items": {}}, headers=COUNTS | TIMING)},
        query=(
            Parameter("after", {"type": "string", "format": "date-time"}, "Only what is later than this."),
            Parameter("event_types", NAMES, "Only these types, separated by commas."),
            Parameter("exclude_types", NAMES, "All but these types, separated by commas."),
            Parameter(
                "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
            ),
            Parameter("offset", {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET, "default": 0}),
        ),
        refuses=frozenset({400}),
    ),
    Operation(
        "tasks_runs_stream_retrieve",
        "GET",
        RUN + "stream/",
        "Follow a run",
        "task:read",
        {
            200: Answer(
                media="text/event-stream",
                schema={"type": "string"},
                text="Server-sent events: `data` is one entry as JSON. The end of the run is the end of the stream.",
            )
        },
        query=(
            Parameter("start", {"type": "string", "enum": ["latest"]}, "Leave out what has happened before."),
            LAST_EVENT_ID,
        ),
    ),
    Operation(
        "tasks_runs_command_create",
        "POST",
        RUN + "command/",
        "Tell the agent of a run something",
        "task:write",
        {
            200: Answer(shapes.TaskRunCommandResponse),
            502: Answer(shapes.ErrorResponse, text="The agent does not answer."),
            504: Answer(shapes.ErrorResponse, text="The agent takes too long."),
        },
        Request(
            "TaskRunCommandRequest",
            Command,
            example={
                "jsonrpc": "2.0",
                "id": 1,
                "method": "user_message",
                "params": {"content": "Now mend the tests, too."},
            },
        ),
        text="JSON-RPC 2.0. Messages (`user_message`, `steer`) are queued and answered at once; the others wait for the"
        " agent. `Idempotency-Key` counts for messages.",
        otherwise={400: shapes.TaskRunErrorResponse},
    ),
    Operation(
        "tasks_runs_connection_token_retrieve",
        "GET",
        RUN + "connection_token/",
        "Get a token for one run",
        "task:write",
        {200: Answer(shapes.ConnectionTokenResponse)},
        query=(
            Parameter(
                "audience",
                {"type": "string", "enum": ["posthog:sandbox_event_ingest"]},
                "For a token that allows to upload events of the run (`event_stream/`).",
            ),
        ),
    ),
    Operation(
        "tasks_runs_relay_message_create",
        "POST",
        RUN + "relay_message/",
        "Relay the end of a turn to a chat",
        "task:write",
        {200: Answer(shapes.TaskRunRelayMessageResponse)},
        Request("TaskRunRelayMessageRequest", RelayMessage, example={"text": "Done: the tests pass."}),
        text="This server knows no chats: the message is checked and skipped.",
    ),
    Operation(
        "tasks_runs_event_stream_create",
        "POST",
        RUN + "event_stream/",
        "Upload events of a run",
        "run token",
        {
            200: Answer(shapes.EventStreamResponse),
            400: Answer(shapes.EventStreamError),
            409: Answer(shapes.EventStreamError, text="A number is out of order."),
            413: Answer(
                shapes.EventStreamError,
                text=f"More than {LINE_BYTES} bytes a line, {REQUEST_BYTES} bytes or {REQUEST_EVENTS} events in all.",
            ),
        },
        content=("application/x-ndjson", {"type": "string"}),
        text='Newline-delimited JSON: `{"seq": 1, "event": {…}}`, numbered without gaps from 1.',
    ),
    Operation(
        "logs_retrieve",
        "GET",
        "/api/logs/{id}/",
        "Read the log of a run by its `log_url`",
        "signature",
        {200: Answer(media="application/jsonl", schema={"type": "string"})},
        query=(
            Parameter("expires", {"type": "string"}, required=True),
            Parameter("signature", {"type": "string"}, required=True),
        ),
    ),
)
