"""The process of the embedded PostgreSQL: launch, end, log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from taskyard.db.embedded_cluster import PORT, explained
from taskyard.db.embedded_files import FileLock
from taskyard.db.embedded_programs import Programs, environment
from taskyard.errors import SetupError

LOG_LIMIT = 5_000_000
"""Bytes; a longer log is put aside when the server is launched."""
POLL_S = 0.02
STOP_STEPS = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))
"""Signals and how long each is waited for, in seconds. PostgreSQL calls them fast shutdown (sessions end,
a checkpoint is written), immediate shutdown (the next start recovers), and the last resort."""

logger = structlog.get_logger(__name__)

# Servers that go on without the object that launched them. They are our children: subprocess warns
# about one that is dropped, and reaps this list's ended ones never earlier than we do.
_left_running: list[subprocess.Popen[bytes]] = []


class Server:
    """The server of one folder, whether this object launched it or found it running.

    Its processes hold `server.lock`, which they inherit at launch: it is free exactly when none of
    them is alive, whatever a left-over pid file says.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self._settings = settings
        self._data = folder / "data"
        self._log = folder / "log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._process: subprocess.Popen[bytes] | None = None

    def launch_unless_alive(self, programs: Programs, sockets: Path) -> None:
        """Start the process if none is alive and this object did not start one before."""
        lock = FileLock(self.folder / "server.lock")
        if self._process is not None or not lock.try_acquire():
            return
        try:
            self._discard_pid_files(sockets)
            self._process = self._launch(programs, sockets, lock)
        finally:
            lock.release()  # the server has inherited it

    def ended(self) -> bool:
        """Whether the process that this object launched is gone."""
        return self._process is not None and self._process.poll() is not None

    def failure(self, what: str) -> SetupError:
        """What went wrong, with what the server printed since this object exists."""
        printed = b""
        if self._log.exists():
            with self._log.open("rb") as log:
                log.seek(self._log_start)
                printed = log.read()
        return explained(f"{what} (log: {self._log})", printed.decode("utf-8", "replace"), self.folder)

    def shut_down(self) -> bool:
        """End the server and wait until its last process is gone; False if even SIGKILL did not help."""
        lock = FileLock(self.folder / "server.lock")
        for number, wait_s in STOP_STEPS:
            deadline = time.monotonic() + wait_s
            signalled = False
            while not lock.try_acquire():
                if not signalled:
                    self._signal(number)
                    signalled = True
                if time.monotonic() > deadline:
                    logger.warning("PostgreSQL does not stop", signal=number.name, waited_s=wait_s)
                    break
                time.sleep(POLL_S)
            else:
                lock.release()
                if self._process is not None:
                    self._process.wait()
                    self._process = None
                return True
        self.leave()
        return False

    def leave(self) -> None:
        """Let the server go on without this object."""
        if self._process is not None:
            _left_running.append(self._process)
            self._process = None

    def _launch(self, programs: Programs, sockets: Path, lock: FileLock) -> subprocess.Popen[bytes]:
        if self._log.exists() and self._log.stat().st_size > LOG_LIMIT:
            self._log.replace(self.folder / "log.1")
        data, run = programs.seen(self._data, sockets)
        settings = {
            **self._settings,
            "listen_addresses": "",
            "unix_socket_directories": run,
            "unix_socket_permissions": "0700",
            "port": str(PORT),
            "logging_collector": "off",
        }
        arguments = ["-D", data]
        for name, value in settings.items():
            arguments += ["-c", f"{name}={value}"]
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._log_start = os.fstat(log).st_size
            return subprocess.Popen(
                programs.command("postgres", arguments, self._data, sockets),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                cwd="/",
                start_new_session=True,  # Ctrl-C in a terminal is for us: we stop the server ourselves
                pass_fds=(lock.fileno(),),
            )
        finally:
            os.close(log)

    def _discard_pid_files(self, sockets: Path) -> None:
        """Remove what a dead server left and another process's number may now be in.

        PostgreSQL would take that process for its predecessor and refuse to start.
        """
        for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
            (sockets / name).unlink(missing_ok=True)
        pid = self._pid_in_file()
        if pid is not None and not self._is_server(pid):
            (self._data / "postmaster.pid").unlink(missing_ok=True)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            return
        pid = self._pid_in_file()
        if pid is not None and self._is_server(pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def _pid_in_file(self) -> int | None:
        try:
            return int((self._data / "postmaster.pid").read_text("utf-8").split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None

    def _is_server(self, pid: int) -> bool:
        """Whether a process can be our cluster's server, whose working directory is the cluster."""
        if not Path("/proc/self/cwd").exists():
            return True  # not Linux: PostgreSQL's own checks decide
        try:
            return Path(f"/proc/{pid}/cwd").samefile(self._data)
        except OSError:
            return False
