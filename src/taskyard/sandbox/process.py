"""A command in a bubblewrap sandbox, from its start to the end of all that it started.

bwrap is two processes: the monitor, our child, which ends with the command's exit status, and the first
process of the sandbox's process namespace, which reaps. When the first process dies, the kernel kills the
whole namespace and only then lets it go; so the pidfd of that process says when everything is gone.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from taskyard.sandbox.policy import Handed
from taskyard.sandbox.provider import STDERR_BYTES, Exit, KilledError, Reason, SandboxError
from taskyard.sandbox.streams import Meter, Streams, Tail, connect

_START_S = 10.0
_DRAIN_S = 1.0
"""What was written to standard error is read within this time after the end. The pipe itself may last: another
command of the sandbox can have got hold of it."""
_SIGKILL_STATUS = 128 + signal.SIGKILL
_FIRST_PID, _COMMAND_PID = 1, 2
"""In the process namespace of the sandbox: the first process starts the command first."""


class BubblewrapProcess:
    """See provider.Process. Made by `start`."""

    def __init__(
        self,
        monitor: subprocess.Popen[bytes],
        streams: Streams,
        info: int,
        was_oom: Callable[[], bool],
        max_output: int | None,
        seconds: float | None,
    ) -> None:
        self._monitor = monitor
        self._streams = streams
        self._was_oom = was_oom
        self._begun = False
        self._first: int | None = None
        """pidfd of the first process of the sandbox."""
        self._why: Reason | None = None
        """For what it was ended by force."""
        self._tail = Tail(STDERR_BYTES)
        self._tail.meter = streams.stdout.meter = Meter(max_output, lambda: self._end_for("output"))
        self._ending: asyncio.Task[None] | None = None
        self.pid = monitor.pid
        self.stdin = streams.stdin
        self.stdout: asyncio.StreamReader = streams.stdout
        self._drain = asyncio.create_task(self._tail.drain(streams.stderr), name=f"stderr of {self.pid}")
        self._look = asyncio.create_task(self._find_first(info), name=f"start of {self.pid}")
        self._end = asyncio.create_task(self._await_end(), name=f"end of {self.pid}")
        if seconds is not None:
            clock = asyncio.get_running_loop().call_later(seconds, self._end_for, "timeout")
            self._end.add_done_callback(lambda _: clock.cancel())

    @property
    def closed(self) -> bool:
        """Ended, with all output read or given up."""
        return self._end.done() and self._streams.closed

    def stderr_tail(self) -> str:
        return self._tail.text()

    def remark(self, text: str) -> None:
        self._tail.remark(text)

    async def wait(self) -> Exit:
        return await asyncio.shield(self._end)

    async def kill(self, why: Reason = "killed") -> None:
        """See provider.Process. why: what wait() tells as the reason."""
        if not self._end.done():
            self._why = self._why or why
            # For a moment after it has forked, the end of bwrap does not yet end the sandbox.
            await asyncio.wait({self._look}, timeout=_START_S)
            if self._first is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._first, signal.SIGKILL)
            else:
                self._monitor.kill()
        await self.wait()
        # Else what nobody will read any more would keep the pipe open.
        self._streams.close()

    async def terminate(self, grace_s: float) -> None:
        if self._first is not None and _signal_command(self._first, signal.SIGTERM):
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.wait()
        await self.kill()

    async def started(self) -> None:
        """Until the sandbox's first process runs. Raises SandboxError when bwrap ends before that."""
        await asyncio.shield(self._look)
        if not self._begun:
            end = await self.wait()
            raise (KilledError if end.reason == "killed" else SandboxError)(
                f"the sandbox does not start: {end.stderr_tail.strip() or f'exit status {end.code}'}"
            )

    def _end_for(self, why: Reason) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self.kill(why), name=f"limit of {self.pid}")

    async def _find_first(self, info: int) -> None:
        """Read from a pipe what bwrap says about the first process."""
        text = b""
        try:
            while not self._begun and (chunk := await _read(info)):
                text += chunk
                with suppress(ValueError):
                    self._first = _open_first(int(json.loads(text)["child-pid"]))
                    self._begun = True
        finally:
            os.close(info)

    async def _await_end(self) -> Exit:
        status = await _ended(self._monitor)
        await self._look
        if self._first is not None:
            await _readable(self._first)
            _reap(self._first)
            os.close(self._first)
            self._first = None
        await asyncio.wait({self._drain}, timeout=_DRAIN_S)
        self._drain.cancel()
        if self.stdin is not None and not self.stdin.is_closing():
            self.stdin.transport.abort()  # what was not written has no reader any more
        code = status if status >= 0 else 128 - status
        return Exit(code, self._reason(code), self.stderr_tail())

    def _reason(self, code: int) -> Reason:
        if code != _SIGKILL_STATUS:
            return "exited"
        return self._why or ("oom" if self._was_oom() else "killed")


async def start(
    command: Sequence[str],
    handed: Handed,
    info: int,
    *,
    stdin: bool,
    oom_kills: Callable[[], int],
    max_output: int | None,
    seconds: float | None,
) -> BubblewrapProcess:
    """Start a command that becomes bwrap. `handed` is what it inherits besides its three standard streams.

    info: where bwrap's `--info-fd` can be read; closed by the process that is returned. Not by the event
    loop's own means: uvloop's leave descriptors of the server open in the child. Raises SandboxError.
    """
    before = oom_kills()
    streams, theirs = await connect(stdin=stdin)
    try:
        monitor = _spawn(command, theirs, handed)
    except BaseException as error:
        streams.close()
        if isinstance(error, OSError):
            raise SandboxError(f"the sandbox does not start: {error}") from error
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    return BubblewrapProcess(monitor, streams, info, lambda: oom_kills() > before, max_output, seconds)


def _spawn(command: Sequence[str], theirs: Sequence[int], handed: Handed) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdout=theirs[0],
        stderr=theirs[1],
        stdin=theirs[2] if len(theirs) > 2 else subprocess.DEVNULL,
        env={},  # bwrap's own can be read inside, in /proc/1/environ
        cwd="/",
        pass_fds=handed.fds,
        start_new_session=True,
    )


async def _ended(monitor: subprocess.Popen[bytes]) -> int:
    """Wait for the exit status, negative for a signal."""
    pidfd = os.pidfd_open(monitor.pid)
    try:
        await _readable(pidfd)
    finally:
        os.close(pidfd)
    return monitor.wait()


def _reap(pidfd: int) -> None:
    """Reap a process that is over, if it was given to us, as orphans are to a server that is process 1."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def _open_first(pid: int) -> int | None:
    """pidfd of a sandbox's first process; None if that is gone, as after a very short command."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if _inner_pid(pid) != _FIRST_PID:  # the number was given to another process
        os.close(pidfd)
        return None
    return pidfd


def _signal_command(first: int, number: int) -> bool:
    """Signal the command whose sandbox has this first process; False if it is not there."""
    pid = _pid_of(first)
    if pid is None:
        return False
    for child in _children(pid):
        with suppress(OSError):
            pidfd = os.pidfd_open(child)
            try:
                if child in _children(pid) and _inner_pid(child) == _COMMAND_PID:
                    signal.pidfd_send_signal(pidfd, number)
                    return True
            finally:
                os.close(pidfd)
    return False


def _pid_of(pidfd: int) -> int | None:
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            return pid if pid > 0 else None
    return None


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _inner_pid(pid: int) -> int | None:
    """The number of a process in its own, innermost process namespace."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return None


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def _read(fd: int) -> bytes:
    await _readable(fd)
    try:
        return os.read(fd, 4096)
    except OSError as error:  # a stray wake-up
        if error.errno != errno.EAGAIN:
            raise
        return await _read(fd)
