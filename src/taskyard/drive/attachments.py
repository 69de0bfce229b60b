"""Files that come with a message: copied into the sandbox, and named in the prompt (run-lifecycle §5.2, §6.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from taskyard.artifacts.paths import safe_name
from taskyard.drive.inside import checked
from taskyard.errors import TaskyardError
from taskyard.objects.interface import Content, ObjectStore, StorageError, media_type
from taskyard.sandbox.provider import Sandbox

Json = dict[str, Any]

FOLDER = ".posthog/attachments"
MAX_NAME_BYTES = 200
WRITE = 'mkdir -p "$(dirname "$1")" && cat > "$1"'


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
    process = await sandbox.exec(["sh", "-c", WRITE, "sh", path], stdin=True)
    assert process.stdin is not None
    try:
        if isinstance(content, bytes):
            process.stdin.write(content)
        else:
            async with aclosing(content.chunks) as chunks:
                async for chunk in chunks:
                    process.stdin.write(chunk)
                    await process.stdin.drain()
        process.stdin.close()
    except (ConnectionError, BrokenPipeError):
        pass  # it ended early, and says why
    except StorageError as error:
        await process.kill()
        raise AttachmentError(f"'{PurePosixPath(path).name}' cannot be read: {error.detail}") from error
    end = checked(await process.wait())
    if end.code != 0:
        name = PurePosixPath(path).name
        raise AttachmentError(f"'{name}' cannot be written in the sandbox: {end.stderr_tail.strip()}")
