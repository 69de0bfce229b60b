"""The PostgreSQL server that Taskyard runs for itself when TASKYARD_DATABASE_URL is not set.

`DATA_DIR/postgres` (mode 0700) holds everything:

    data/           the cluster
    run/            the socket; no TCP port is opened. Whoever reaches this folder is trusted.
    log, log.1      what the server prints
    users.lock      held shared by each process that uses the server; the last one out stops it
    start.lock      held while somebody starts or stops the server
    server.lock     held by the server's own processes
    socket-folder   names the folder of the socket when the path of run/ is too long for one

A server that outlived its starter is adopted by the next start.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psycopg
import structlog

from taskyard.db.embedded_cluster import (
    create_cluster,
    create_socket_folder,
    forget_socket_folder,
    socket_folder,
    url,
)
from taskyard.db.embedded_files import FileLock, ServeLock, disk_full, folder_errors, make_private
from taskyard.db.embedded_programs import find_programs
from taskyard.db.embedded_server import POLL_S, Server
from taskyard.errors import SetupError

logger = structlog.get_logger(__name__)
T = TypeVar("T")

__all__ = ["EmbeddedPostgres", "ServeLock", "running_url"]

DATABASE = "taskyard"
START_WAIT_S = 60.0
"""How long a server may take to accept connections; it may have to recover from a crash."""
KEEP_S = 0.5
"""A server that has ended is noticed after this time."""
LOCK_WAIT_S = 120.0
"""How long another process may take to create the cluster and start the server, or to stop it."""


class EmbeddedPostgres:
    """A hold on the server of a data folder, from `start` to `stop`.

    Several processes, and several objects of one process, may hold the same server. `settings` are
    given to the server on its command line if this object is the one that launches it.
    """

    def __init__(
        self, data_dir: Path, *, settings: Mapping[str, str] | None = None, start_wait_s: float = START_WAIT_S
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.folder = self.data_dir / "postgres"
        self._settings = dict(settings or {})
        self._start_wait_s = start_wait_s
        self._users = FileLock(self.folder / "users.lock")
        self._server: Server | None = None
        self._cancelled = threading.Event()

    async def start(self) -> str:
        """Launch the server, or join it if it runs; returns the libpq URL of the database `taskyard`.

        A missing cluster or database is created. Raises SetupError, with the server's own words where
        they help. When cancelled, it undoes what it did before it ends.
        """
        try:
            return await self._in_thread(self._start)
        except asyncio.CancelledError:
            await self.stop()
            raise

    async def keep(self) -> None:
        """Start the server again whenever it has ended, until cancelled: between `start` and `stop`."""
        while True:
            await asyncio.sleep(KEEP_S)
            if await asyncio.to_thread(self._is_alive):
                continue
            logger.error("PostgreSQL has ended, starting it again", log=str(self.folder / "log"))
            try:
                await self._in_thread(self._revive)
            except SetupError as error:
                logger.warning("PostgreSQL does not start, trying again", error=error.detail)

    async def stop(self) -> None:
        """Leave the server; if nobody else uses it, shut it down and wait for its end. Idempotent."""
        await asyncio.to_thread(self._stop)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """The result of blocking work that looks at `_cancelled`; when cancelled, it still waits for its end."""
        self._cancelled.clear()
        task = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._cancelled.set()
            await asyncio.wait([task])
            self._cancelled.clear()
            task.exception()  # it failed because it was cancelled
            raise

    # What follows runs in a thread: it waits by polling, so that a cancelled start ends soon.

    def _start(self) -> str:
        with folder_errors(self.data_dir):
            make_private(self.data_dir)
            make_private(self.folder)
            with self._starting() as lock:
                # Taken exclusively only under start.lock, which we hold: this cannot fail.
                self._users.try_acquire(shared=True)
                try:
                    return self._connected(lock)
                except _NotReadyError:
                    self._users.release()
                    if self._server is not None:
                        self._server.leave()
                    raise
                except BaseException:
                    self._users.release()
                    self._shut_down_unless_used()
                    raise

    def _is_alive(self) -> bool:
        lock = FileLock(self.folder / "server.lock")
        try:
            alive = not lock.try_acquire(shared=True)
        except OSError:
            return True  # not known
        lock.release()
        return alive

    def _revive(self) -> None:
        with folder_errors(self.data_dir), self._starting() as lock:
            if self._server is not None:
                self._server.leave()
            self._connected(lock)

    def _connected(self, lock: FileLock) -> str:
        programs = find_programs()
        create_cluster(self.folder, programs, lock)
        sockets = create_socket_folder(self.folder, programs)
        self._server = Server(self.folder, self._settings)
        deadline = time.monotonic() + self._start_wait_s
        while (problem := self._connect(self._server, sockets)) is not None:
            if self._server.ended():
                raise self._server.failure("PostgreSQL ended while it started")
            if self._cancelled.is_set():
                raise SetupError("the start of PostgreSQL was cancelled")
            if time.monotonic() > deadline:
                what = f"PostgreSQL did not get ready in {self._start_wait_s:g} s and goes on: {problem}"
                raise _NotReadyError(self._server.failure(what).detail)
            # Asked each time: a server that we found may have been about to end.
            self._server.launch_unless_alive(programs, sockets)
            time.sleep(POLL_S)
        return url(sockets, DATABASE)

    def _connect(self, server: Server, sockets: Path) -> str | None:
        """None when the server answers, else why not. Creates our database when it is missing."""
        wait_s = max(2, min(10, int(self._start_wait_s)))
        try:
            with psycopg.connect(
                url(sockets, "postgres"), autocommit=True, connect_timeout=wait_s
            ) as connection:
                query = "SELECT 1 FROM pg_database WHERE datname = %s"
                if connection.execute(query, [DATABASE]).fetchone() is None:
                    connection.execute("CREATE DATABASE taskyard")
        except psycopg.errors.DiskFull as error:
            raise disk_full(self.folder) from error
        except psycopg.OperationalError as error:
            return str(error).strip()
        except psycopg.Error as error:
            raise server.failure(f"cannot create the database {DATABASE}: {error}") from error
        return None

    def _stop(self) -> None:
        if self._users.held:
            self._users.release()
            with folder_errors(self.data_dir), self._starting():
                self._shut_down_unless_used()

    def _shut_down_unless_used(self) -> None:
        """Only under start.lock and after leaving: nobody can join between the question and the act."""
        server = self._server or Server(self.folder, self._settings)
        self._server = None
        if not self._users.try_acquire():
            server.leave()
            return
        try:
            if server.shut_down():
                forget_socket_folder(self.folder)
        finally:
            self._users.release()

    @contextmanager
    def _starting(self) -> Iterator[FileLock]:
        lock = FileLock(self.folder / "start.lock")
        deadline = time.monotonic() + LOCK_WAIT_S
        while not lock.try_acquire():
            if self._cancelled.is_set():
                raise SetupError("the start of PostgreSQL was cancelled")
            if time.monotonic() > deadline:
                raise SetupError(
                    f"another process has held {lock.path} for {LOCK_WAIT_S:g} s, to start or stop PostgreSQL: "
                    f"see {self.folder / 'log'}, or end that process"
                )
            time.sleep(POLL_S)
        try:
            yield lock
        finally:
            lock.release()


class _NotReadyError(SetupError):
    """The server is still starting. It is left alone: the next start may find it recovered."""


def running_url(data_dir: Path) -> str | None:
    """The libpq URL of a data folder's database if its server answers now, else None.

    It holds nothing: the server may end at any time. To work with the database use EmbeddedPostgres,
    which joins a running server.
    """
    found = url(socket_folder(data_dir.absolute() / "postgres"), DATABASE)
    try:
        psycopg.connect(found, connect_timeout=5).close()
    except psycopg.OperationalError:
        return None
    return found
