"""Files that come with a message: copied into the sandbox, and named in the prompt (run-lifecycle §5.2, §6.4)."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from taskyard.artifacts.paths import safe_name
from taskyard.drive.inside import feed, script
from taskyard.errors import TaskyardError
from taskyard.objects.interface import Content, ObjectStore, StorageError, media_type
from taskyard.sandbox.provider import Sandbox

Json = dict[str, Any]

FOLDER = ".posthog/attachments"
MAX_NAME_BYTES = 200
WRITE_S = 600.0
# To a name that nobody knows: what the agent has put at the path, such as a pipe, is not opened.
WRITE = """
mkdir -p "$(dirname "$1")" && cat > "$2" && mv -T "$2" "$1" && exit
code=$?
rm -f "$2"
exit $code
"""


class AttachmentError(TaskyardError):
    """An attachment could not be copied into the sandbox."""


async def deliver(
    objects: ObjectStore, sandbox: Sandbox, folder: str, run_id: str, entries: Sequence[Mapping[str, Any]]
) -> list[Json]:
    """Copy a run's artifacts to `folder`/.posthog/attachments/…; a prompt block for each, in their order.

    Git does not see them there. Raises AttachmentError naming the one that is missing or cannot be written.
    """
    blocks: list[Json] = []
    if entries:
        await _write(sandbox, f"{folder}/{FOLDER}/.gitignore", b"*\n")
    for entry in entries:
        name = safe_name(str(entry["name"])).encode()[-MAX_NAME_BYTES:].decode(errors="ignore")
        path = f"{folder}/{FOLDER}/{run_id}/{safe_name(str(entry['id']))}/{name}"
        try:
            content = await objects.open(str(entry["storage_path"]))
        except StorageError as error:
            raise AttachmentError(f"The attachment '{name}' cannot be read: {error.detail}") from error
        if content is None:
            raise AttachmentError(f"The attachment '{name}' is not in the object storage any more.")
        await _write(sandbox, path, content)
        block = {"type": "resource_link", "uri": f"file://{quote(path)}", "name": name, "size": content.size}
        blocks.append(block | {"mimeType": media_type(entry.get("content_type"))})
    return blocks


async def _write(sandbox: Sandbox, path: str, content: Content | bytes) -> None:
    """Write a file inside the sandbox, by a process in it: no host path is touched."""
    name = PurePosixPath(path).name
    chunks = _whole(content) if isinstance(content, bytes) else content.chunks
    argv = script(WRITE, path, f"{path[: -len(name)]}.{secrets.token_hex(8)}.part")
    try:
        async with aclosing(chunks):
            code, why = await feed(sandbox, argv, chunks, timeout=WRITE_S)
    except StorageError as error:
        raise AttachmentError(f"'{name}' cannot be read: {error.detail}") from error
    if code != 0:
        raise AttachmentError(f"'{name}' cannot be written in the sandbox: {why}")


async def _whole(content: bytes) -> AsyncGenerator[bytes]:
    yield content
