"""What providers of images ask of a sandbox: the programs it must have, and what a command in it says."""

from __future__ import annotations

from taskyard.sandbox.provider import Sandbox, SandboxError

PROGRAMS = ("python3", "git", "sh", "tar", "gzip", "find", "du")
"""What every image must have; the agents' own programs come on top."""


async def said(sandbox: Sandbox, *argv: str) -> str:
    """What a command says that has to work. Raises SandboxError."""
    process = await sandbox.exec(argv, cwd="/")
    try:
        output = await process.stdout.read()
        end = await process.wait()
    finally:
        await process.kill()
    if end.code != 0:
        raise SandboxError(
            f"a command in a sandbox failed: {end.stderr_tail.strip() or f'status {end.code}'}"
        )
    return output.decode("utf-8", "replace")
