"""What a sandbox environment does before the agent starts: its set-up script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from taskyard.db.engine import Row
from taskyard.drive.failures import LIMITS, RunFailure, with_tail
from taskyard.drive.inside import checked
from taskyard.gateway.server import Gateway
from taskyard.sandbox.provider import Sandbox

MAX_LINES = 1000
MAX_LINE = 2000
GRACE_S = 30.0
"""A sandbox that the server cannot reach any more ends the script by itself, so much later."""

# The script is $1. One that names its interpreter is a program of its own; others are for bash, else for sh.
_RUN = """
exec 2>&1
case "$1" in
'#!'*) file=$(mktemp) && printf '%s' "$1" > "$file" && chmod 700 "$file" && exec "$file" ;;
esac
shell=$(command -v bash) || shell=sh
exec "$shell" -e -c "$1"
"""


async def run_setup(
    environment: Row,
    sandbox: Sandbox,
    gateway: Gateway,
    say: Callable[[str], Awaitable[None]],
    *,
    env: Mapping[str, str],
    cwd: str,
    timeout_s: float,
    max_output: int | None,
) -> None:
    """Run the script of an environment, with the network that its agent has. `say` gets its output, line by line.

    Raises RunFailure setup_failed, with the end of the output; KilledError.
    """
    argv = ["/bin/sh", "-c", _RUN, "sh", environment["setup_script"]]
    process = await sandbox.exec(
        argv, env=env, cwd=cwd, on_listener=gateway.serve, max_output=max_output, seconds=timeout_s + GRACE_S
    )
    tail: list[str] = []
    name = f"The set-up script of the sandbox environment '{environment['name']}'"
    try:
        async with asyncio.timeout(timeout_s):
            shown = 0
            async for raw in _lines(process.stdout):
                line = raw.decode("utf-8", "replace").rstrip()[:MAX_LINE]
                tail = [*tail[-19:], line]
                shown += 1
                if shown <= MAX_LINES and line:
                    await say(line)
                if shown == MAX_LINES:
                    await say("… further output is not shown")
            end = checked(await process.wait())
    except TimeoutError:
        raise RunFailure(
            "setup_failed", with_tail(f"{name} took longer than {timeout_s:g} seconds.", "\n".join(tail))
        ) from None
    finally:
        await asyncio.shield(process.kill())
    if end.code != 0:
        why = (
            f"was ended: {LIMITS[end.reason][1]}"
            if end.reason in LIMITS
            else f"ended with exit code {end.code}"
        )
        raise RunFailure("setup_failed", with_tail(f"{name} {why}.", "\n".join(tail)))


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines, those that are too long for the reader in pieces."""
    rest = b""
    while chunk := await reader.read(65536):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line
        if len(rest) > 65536:
            yield rest
            rest = b""
    if rest:
        yield rest
