"""`taskyard sandbox shell`: the sandbox that an agent would get, for a person."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from taskyard.cli.options import DataDir, load_settings
from taskyard.errors import InvalidInputError

if TYPE_CHECKING:
    import asyncio

    from taskyard.db.engine import Database, Row
    from taskyard.drive.trial import Trial
    from taskyard.gateway.server import Refusal
    from taskyard.sandbox.provider import Process
    from taskyard.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Try by hand what agents may do.")

# A terminal of the sandbox's own, since the one outside must not be within its reach. $1, $2: its size.
_TERMINAL = """
import fcntl, os, pty, select, struct, sys, termios
rows, columns = map(int, sys.argv[1:3])
shell = next((path for path in ("/bin/bash", "/usr/bin/bash") if os.path.exists(path)), "/bin/sh")
pid, fd = pty.fork()
if pid == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.execv(shell, [shell, "-i"])
while True:
    ready = select.select([0, fd], [], [])[0]
    if 0 in ready:
        data = os.read(0, 65536)
        if not data: break
        os.write(fd, data)
    if fd in ready:
        try: data = os.read(fd, 65536)
        except OSError: break
        if not data: break
        os.write(1, data)
os.close(fd)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
"""


@app.callback()
def sandbox() -> None:
    pass


@app.command()
def shell(
    environment: Annotated[
        str | None, typer.Argument(metavar="[ENV]", help="A sandbox environment's name or id; default: none.")
    ] = None,
    command: Annotated[
        str | None, typer.Option("--command", "-c", help="Run this instead of an interactive shell.")
    ] = None,
    project: Annotated[
        int | None, typer.Option("--project", help="Where several environments have the name.")
    ] = None,
    setup: Annotated[
        bool, typer.Option("--setup/--no-setup", help="Run the environment's set-up script first.")
    ] = True,
    data_dir: DataDir = None,
) -> None:
    """Open a shell in a sandbox as an agent gets it: same limits, variables, network and set-up script.

    It has no repository, and models do not answer. What the network refuses is told as it happens. Works beside a
    running server, on a machine that runs workers. The sandbox is removed in the end.
    """
    import asyncio

    from taskyard.telemetry import configure_logging

    settings = load_settings(data_dir)
    configure_logging("warning", "console")
    raise typer.Exit(asyncio.run(_shell(settings, environment, project, command, setup=setup)))


async def _shell(
    settings: Settings, word: str | None, project: int | None, command: str | None, *, setup: bool
) -> int:
    from taskyard.db.engine import open_database
    from taskyard.drive.failures import RunFailure
    from taskyard.drive.trial import open_trial
    from taskyard.sandbox.providers import provider_for

    interactive = command is None and sys.stdin.isatty() and sys.stdout.isatty()
    end = "\r\n" if interactive else "\n"
    seen: set[str] = set()

    async def say(text: str) -> None:
        _tell(text, end)

    def refused(refusal: Refusal) -> None:
        text = f"Network: refused {refusal.method} {refusal.target}: {refusal.reason}"
        if text not in seen:
            seen.add(text)
            _tell(text, end)

    provider = provider_for(settings)
    try:
        async with open_database(settings, max_connections=2) as database:
            found = await _find(database, word, project)
            async with open_trial(settings, database, provider, found, say, refused, setup=setup) as trial:
                if interactive:
                    return await _converse(trial)
                argv = ["/bin/sh", "-c", f"exec 2>&1\n{command}"] if command is not None else ["/bin/sh"]
                return await _carry(await trial.start(argv, {}), closed=command is not None)
    except RunFailure as failure:
        raise InvalidInputError(failure.message) from failure
    finally:
        await provider.close()


async def _find(database: Database, word: str | None, project: int | None) -> Row | None:
    from taskyard.environments import store

    if word is None:
        return None
    found = [
        row for row in await store.named(database, word) if project is None or row["project_id"] == project
    ]
    if not found:
        raise InvalidInputError(f"there is no sandbox environment '{word}'")
    if len(found) > 1:
        where = ", ".join(f"{row['id']} (project {row['project_id']})" for row in found)
        raise InvalidInputError(f"several sandbox environments are called '{word}': {where}; name the id")
    return found[0]


async def _converse(trial: Trial) -> int:
    """A shell at this terminal, until it ends."""
    size = os.get_terminal_size()
    argv = ["python3", "-I", "-c", _TERMINAL, str(size.lines), str(size.columns)]
    process = await trial.start(argv, {"TERM": os.environ.get("TERM", "dumb")})
    with _raw(sys.stdin.fileno()):
        _tell(f"A shell in the sandbox {trial.sandbox.id}; `exit` removes it.", "\r\n")
        return await _carry(process, closed=False)


async def _carry(process: Process, *, closed: bool) -> int:
    """Carry standard input and output until the command ends; its exit status."""
    import asyncio

    assert process.stdin is not None
    feeding = None if closed else asyncio.create_task(_feed(process.stdin))
    if closed:
        process.stdin.close()
    try:
        while data := await process.stdout.read(65536):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        end = await process.wait()
    finally:
        if feeding is not None:
            feeding.cancel()
        await asyncio.shield(process.kill())
    if end.reason != "exited":
        _tell(f"The command was ended: {end.reason}.", "\n")
    elif tail := end.stderr_tail.strip():
        _tell(tail, "\n")
    return end.code


async def _feed(stdin: asyncio.StreamWriter) -> None:
    """What is typed, or piped in, goes to the command."""
    import asyncio

    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[bytes] = asyncio.Queue()
    descriptor = sys.stdin.fileno()
    try:
        loop.add_reader(descriptor, lambda: arrived.put_nowait(os.read(descriptor, 65536)))
    except PermissionError:  # a file is always ready, and cannot be waited for
        while data := os.read(descriptor, 65536):
            stdin.write(data)
            await stdin.drain()
    else:
        try:
            while data := await arrived.get():
                stdin.write(data)
                await stdin.drain()
        finally:
            loop.remove_reader(descriptor)
    stdin.close()


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """The terminal hands on each key; the one in the sandbox makes sense of them."""
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor, termios.TCSANOW)  # keeps what was typed already
    try:
        yield
    finally:
        # What was typed, or what the terminal answered to the sandbox, is not for the shell that comes next.
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


def _tell(text: str, end: str) -> None:
    from taskyard.cli.text import clean

    sys.stderr.write(clean(text).replace("\n", end) + end)
    sys.stderr.flush()
