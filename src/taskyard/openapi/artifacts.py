"""The operations of artifacts, and of the store on this server that keeps their content."""

from __future__ import annotations

from taskyard.artifacts.schemas import (
    ByPath,
    Finalize,
    FinalizeItem,
    Inline,
    InlineItem,
    Prepare,
    PrepareItem,
)
from taskyard.objects.local import ROUTE
from taskyard.openapi import shapes
from taskyard.openapi.operation import RUN, TASK, Answer, Operation, Parameter, Request

ARTIFACTS = RUN + "artifacts/"
STAGED = TASK.replace("{task_id}", "{id}") + "staged_artifacts/"
PREPARE = {"artifacts": [{"name": "trace.txt", "type": "user_attachment", "size": 2048}]}
FINALIZE = {
    "artifacts": [
        {
            "id": "9d1f0c2f5b6e4c0e8f6a1f4f3c1b2a90",
            "name": "trace.txt",
            "type": "user_attachment",
            "storage_path": "tasks/artifacts/team_1/task_…/9d1f0c2f…/trace.txt",
        }
    ]
}
BY_PATH = {"storage_path": "tasks/artifacts/team_1/task_…/run_…/9d1f0c2f_trace.txt"}
BYTES = Answer(media="*/*", schema={"type": "string", "format": "binary"}, text="The content.")
XML = Answer(media="application/xml", schema={"type": "string"}, text="An error as S3 writes it.")
FORM = {
    "type": "object",
    "description": "All `fields` of `presigned_post` as they are, then the content.",
    "required": ["key", "policy", "x-amz-signature", "file"],
    "properties": {
        "key": {"type": "string"},
        "policy": {"type": "string"},
        "x-amz-signature": {"type": "string"},
        "file": {"type": "string", "format": "binary"},
    },
}

OPERATIONS = (
    Operation(
        "tasks_staged_artifacts_prepare_upload_create",
        "POST",
        STAGED + "prepare_upload/",
        "Prepare to upload files for the next run of a task",
        "task:write",
        {200: Answer(shapes.TaskStagedArtifactsPrepareUploadResponse)},
        Request(
            "TaskStagedArtifactsPrepareUploadRequest",
            Prepare,
            example=PREPARE,
            parts={PrepareItem: "TaskStagedArtifactPrepareUpload"},
        ),
        text="Send each file with the form that is answered, then call `finalize_upload/`.",
        otherwise={400: shapes.ErrorResponse},
    ),
    Operation(
        "tasks_staged_artifacts_finalize_upload_create",
        "POST",
        STAGED + "finalize_upload/",
        "Finalize the upload of files for the next run of a task",
        "task:write",
        {200: Answer(shapes.TaskStagedArtifactsFinalizeUploadResponse)},
        Request(
            "TaskStagedArtifactsFinalizeUploadRequest",
            Finalize,
            example=FINALIZE,
            parts={FinalizeItem: "TaskStagedArtifactFinalizeUpload"},
        ),
        text="All or none. Within a day a run takes them by `pending_user_artifact_ids`, once.",
        otherwise={400: shapes.ErrorResponse},
    ),
    Operation(
        "tasks_runs_artifacts_create",
        "POST",
        ARTIFACTS,
        "Upload small files of a run",
        "task:write",
        {200: Answer(shapes.TaskRunArtifactsUploadResponse)},
        Request(
            "TaskRunArtifactsUploadRequest",
            Inline,
            example={"artifacts": [{"name": "plan.md", "type": "plan", "content": "1. Look.\n2. Mend.\n"}]},
            parts={InlineItem: "TaskRunArtifactUpload"},
        ),
        otherwise={400: shapes.ErrorResponse},
    ),
    Operation(
        "tasks_runs_artifacts_prepare_upload_create",
        "POST",
        ARTIFACTS + "prepare_upload/",
        "Prepare to upload files of a run",
        "task:write",
        {200: Answer(shapes.TaskRunArtifactsPrepareUploadResponse)},
        Request(
            "TaskRunArtifactsPrepareUploadRequest",
            Prepare,
            example=PREPARE,
            parts={PrepareItem: "TaskRunArtifactPrepareUpload"},
        ),
        text="Send each file with the form that is answered, then call `finalize_upload/`.",
        otherwise={400: shapes.ErrorResponse},
    ),
    Operation(
        "tasks_runs_artifacts_finalize_upload_create",
        "POST",
        ARTIFACTS + "finalize_upload/",
        "Finalize the upload of files of a run",
        "task:write",
        {200: Answer(shapes.TaskRunArtifactsFinalizeUploadResponse)},
        Request(
            "TaskRunArtifactsFinalizeUploadRequest",
            Finalize,
            example=FINALIZE,
            parts={FinalizeItem: "TaskRunArtifactFinalizeUpload"},
        ),
        text="All or none; a file that the run has already is answered as it is.",
        otherwise={400: shapes.ErrorResponse},
    ),
    Operation(
        "tasks_runs_artifacts_presign_create",
        "POST",
        ARTIFACTS + "presign/",
        "Get a URL of a file of a run",
        "task:read",
        {200: Answer(shapes.TaskRunArtifactPresignResponse)},
        Request("TaskRunArtifactPresignRequest", ByPath, example=BY_PATH),
        otherwise={400: shapes.ErrorResponse, 404: shapes.ErrorResponse},
    ),
    Operation(
        "tasks_runs_artifacts_download_create",
        "POST",
        ARTIFACTS + "download/",
        "Read a file of a run, or of one that it resumes",
        "task:read",
        {200: BYTES},
        Request("TaskRunArtifactPresignRequest", ByPath, example=BY_PATH),
        otherwise={400: shapes.ErrorResponse, 404: shapes.ErrorResponse},
    ),
    Operation(
        "objects_create",
        "POST",
        ROUTE,
        "Send a file with a form from `prepare_upload/`",
        "signature",
        {204: Answer(media=None), **dict.fromkeys((400, 403, 412, 503), XML)},
        content=("multipart/form-data", FORM),
        text="Only when this server keeps the files itself: use the `url` of the form.",
    ),
    Operation(
        "objects_retrieve",
        "GET",
        ROUTE + "/{key}",
        "Read a file by its signed URL",
        "signature",
        {
            200: BYTES,
            206: Answer(media="*/*", schema={"type": "string", "format": "binary"}, text="A range of it."),
            **dict.fromkeys((403, 404, 416, 503), XML),
        },
        query=(
            Parameter("expires", {"type": "string"}, required=True),
            Parameter("signature", {"type": "string"}, required=True),
            Parameter("response-content-type", {"type": "string"}),
            Parameter("response-content-disposition", {"type": "string"}),
        ),
    ),
)
