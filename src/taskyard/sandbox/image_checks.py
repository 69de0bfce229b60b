"""What providers of images ask of a sandbox: the programs it must have, and what a command in it says."""

from __future__ import annotations

import asyncio

from taskyard.sandbox.provider import Sandbox, SandboxError
from taskyard.sandbox.streams import read_all

DEADLINE_S = 60.0
MOST = 64 * 1024
"""Bytes that a command may say."""

PROGRAMS = ("python3", "git", "sh", "tar", "gzip", "find", "du")
"""What every image must have; the agents' own programs come on top."""


async def said(sandbox: Sandbox, *argv: str) -> str:
    """What a command says that has to work. Raises SandboxError."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            process = await sandbox.exec(argv, cwd="/", max_output=MOST, seconds=DEADLINE_S)
            try:
                output = await read_all(process, MOST)
                end = await process.wait()
            finally:
                await process.kill()
    except TimeoutError:
        raise SandboxError(f"a command in a sandbox has not ended for {DEADLINE_S:g} seconds") from None
    if end.code != 0:
        raise SandboxError(
            f"a command in a sandbox failed: {end.stderr_tail.strip() or f'status {end.code}'}"
        )
    return output.decode("utf-8", "replace")
