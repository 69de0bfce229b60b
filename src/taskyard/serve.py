"""The processes of a site: `serve` is all in one, `serve_api` and `run_worker` are its parts."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import structlog
import uvicorn
import uvloop

from taskyard.accounts.admin import First, bootstrap
from taskyard.app import application, asgi
from taskyard.db.embedded import ServeLock
from taskyard.db.engine import Database, open_database
from taskyard.errors import SetupError
from taskyard.redact import LOGS
from taskyard.security import secret_keys
from taskyard.settings import Settings, server_secrets
from taskyard.telemetry import configure_logging

log = structlog.get_logger()

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def serve(settings: Settings, host: str, port: int) -> None:
    """API, worker and, without a database URL, PostgreSQL, until SIGINT or SIGTERM."""
    _run(settings, lambda stop: _serve(settings, host, port, stop))


def serve_api(settings: Settings, host: str, port: int) -> None:
    """The API alone; needs TASKYARD_DATABASE_URL."""
    _need_database(settings)
    _run(settings, lambda stop: _serve(settings, host, port, stop, worker=False))


def run_worker(settings: Settings) -> None:
    """A worker alone; needs TASKYARD_DATABASE_URL."""
    _need_database(settings)
    _run(settings, lambda stop: _work(settings, stop))


class Stop:
    """What SIGINT and SIGTERM ask for: the first to stop, a second one to hurry."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self.hurry = asyncio.Event()

    def set(self) -> None:
        if self._asked.is_set():
            log.info("stopping at once")
            self.hurry.set()
        self._asked.set()

    async def wait(self) -> None:
        await self._asked.wait()
        log.info("stopping")


def _run(settings: Settings, main: Callable[[Stop], Awaitable[None]]) -> None:
    configure_logging(settings.log_level, settings.log_format)
    LOGS.add(server_secrets(settings))
    allow_descriptors()
    if settings.secret_keys:
        secret_keys(settings)  # one that is none is told now, and not when the first secret is stored

    async def run() -> None:
        stop = Stop()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def allow_descriptors() -> None:
    """Take as many descriptors as the system lets this user have: a live run holds nine, a stream one, and the usual
    first limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where "unlimited" is more than the system takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(settings: Settings, host: str, port: int, stop: Stop, *, worker: bool = True) -> None:
    _make_private(settings.data_dir)
    async with AsyncExitStack() as stack:
        if settings.database_url is None:
            stack.enter_context(ServeLock(settings.data_dir))
        database = await stack.enter_async_context(open_database(settings))
        first = await bootstrap(database)
        if first is not None:
            _write_private(settings.data_dir / "first-key", first.key + "\n")
        # First the address: should it be taken, no run must have been begun. It also means that, at the end,
        # clients still hear how the runs end.
        url = await stack.enter_async_context(listening(settings, database, host, port))
        if worker:
            from taskyard.worker import running_worker

            await stack.enter_async_context(running_worker(settings, database, stop.hurry))
        state = settings.data_dir / "server.json"
        _write_private(state, json.dumps({"url": url, "pid": os.getpid()}) + "\n")
        stack.callback(state.unlink, missing_ok=True)
        _announce(settings.base_url or url, first, host)
        await stop.wait()


@asynccontextmanager
async def listening(settings: Settings, database: Database, host: str, port: int) -> AsyncIterator[str]:
    """The HTTP server, listening; its URL."""
    api = application(settings, database)
    config = uvicorn.Config(
        asgi(api, settings),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="on",
        proxy_headers=True,
        timeout_graceful_shutdown=3,
        server_header=False,
    )

    def end_streams() -> None:
        """Who follows a run goes on at another process, or when this one is back."""
        api.state.tails.end()

    server = Server(config, end_streams)
    task = asyncio.create_task(server.serve(), name="http")
    started = asyncio.create_task(server.listening.wait())
    await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
    if not server.listening.is_set():
        started.cancel()
        await task
        raise SetupError(
            f"cannot listen on {host} port {port}: it is taken, or not an address of this machine. "
            "Give another --host or --port (0 takes a free one)."
        )
    bound = server.servers[0].sockets[0].getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else shown}:{bound}"  # noqa: S104 - comparison
    finally:
        server.should_exit = True
        await task


class Server(uvicorn.Server):
    """uvicorn without its own signal handling, that tells when it listens."""

    def __init__(self, config: uvicorn.Config, before_stop: Callable[[], object] = lambda: None) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._before_stop = before_stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the whole process (`_run`): clients still hear how runs end while the worker drains."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._before_stop()
        await super().shutdown(sockets)

    async def startup(self, sockets: object = None) -> None:
        try:
            await super().startup()
        except SystemExit:  # uvicorn's way to say that it cannot bind
            self.should_exit = True
            return
        if self.started:
            self.listening.set()


async def _work(settings: Settings, stop: Stop) -> None:
    from taskyard.worker import running_worker

    _make_private(settings.data_dir)
    async with open_database(settings) as database, running_worker(settings, database, stop.hurry):
        log.info("worker ready", concurrency=settings.worker.concurrency)
        await stop.wait()


def _need_database(settings: Settings) -> None:
    if settings.database_url is None:
        raise SetupError(
            "TASKYARD_DATABASE_URL is not set: parts on several machines need a PostgreSQL that all of them reach. "
            "For everything in one process use `taskyard serve`."
        )


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise SetupError(
            f"cannot use the data folder {folder}: {error.strerror}. Give another --data-dir."
        ) from error


def _write_private(path: Path, text: str) -> None:
    """A file that only this user can read, complete or not there at all."""
    part = path.with_name(path.name + ".part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        part.rename(path)
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from error


def _announce(url: str, first: First | None, host: str) -> None:
    """What a person needs to know, on standard output."""
    print(f"Taskyard is ready at {url}", flush=True)  # noqa: T201 - this is the command's output
    if first is not None:
        print(f"First user's API key (shown once, kept in the data folder): {first.key}", flush=True)  # noqa: T201
        link = url.rstrip("/") + first.link
        print(f"To sign in with a browser, set a password here (works once, for a day): {link}", flush=True)  # noqa: T201
    if host not in LOOPBACK:
        log.warning("the API is reachable from the network without TLS: put a TLS proxy before it", host=host)
