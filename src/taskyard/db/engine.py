"""Connections to PostgreSQL.

SQL is written by hand and lives in the rooms' `store.py` files. A single statement runs on an
autocommit connection; work that belongs together runs in `Database.transaction()`. Services never
commit: whoever opened the transaction does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, LiteralString

import msgspec
import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from taskyard.errors import ServiceUnavailableError, SetupError
from taskyard.settings import Settings

Row = dict[str, Any]
Connection = psycopg.AsyncConnection[Row]


class DatabaseUnavailableError(ServiceUnavailableError):
    """The database does not answer. Try again in a moment."""


AWAY = (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction, DatabaseUnavailableError)
"""What is raised while the database cannot be used, and is worth another try: restarts, lost connections, failover."""


def raise_cancelled() -> None:
    """For loops around the database: a cancelled query can come back as an error, or even with its result.

    Raises CancelledError when this task was told to end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Database:
    """A pool of connections to one database, given as a libpq URL."""

    def __init__(self, url: str, *, max_connections: int = 16) -> None:
        self.url = url
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            min_size=1,
            max_size=max_connections,
            open=False,
            timeout=30,
            # The waits between attempts double; after this long the pool gives up, and the next request tries at once.
            reconnect_timeout=2,
            configure=_configure,
            kwargs={
                "autocommit": True,
                "row_factory": dict_row,
                "connect_timeout": 10,
                "options": "-c timezone=UTC",
            },
        )
        self._checking: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the pool; SetupError when the database cannot be reached."""
        try:
            await self._pool.open(wait=True, timeout=30)
        except PoolTimeout as error:
            await self._pool.close()
            raise SetupError(f"cannot connect to PostgreSQL: {await connect_problem(self.url)}") from error

    async def close(self) -> None:
        if self._checking is not None:
            await asyncio.wait({self._checking})
        await self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit mode, for single statements."""
        if (shared := self._joined()) is not None:
            async with shared.transaction():  # a savepoint: a failed statement costs only itself
                yield shared
            return
        try:
            async with self._pool.connection() as connection:
                yield connection
        except (PoolTimeout, psycopg.errors.ConnectionTimeout) as error:
            raise DatabaseUnavailableError from error
        except psycopg.OperationalError:
            self._check_others()
            raise

    def _check_others(self) -> None:
        """When one connection was lost, the others mostly were too: replace them before somebody gets one."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._pool.check(), name="check connections")

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection inside a transaction that commits at the end of the block."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    @asynccontextmanager
    async def one_transaction(self) -> AsyncIterator[Connection]:
        """A transaction that everything done in this task until the end of the block takes part in.

        `connection()` and `transaction()` give out its connection, so what they did is committed, or not, with
        it. Not for code that waits for another process to see its work, nor for concurrent tasks.
        """
        async with self.transaction() as connection:
            token = _shared.set((self, connection))
            try:
                yield connection
            finally:
                _shared.reset(token)

    def is_shared(self) -> bool:
        """Whether this task is inside of a `one_transaction`."""
        return self._joined() is not None

    def _joined(self) -> Connection | None:
        shared = _shared.get()
        return shared[1] if shared is not None and shared[0] is self else None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done in the block takes no part in `one_transaction`: it is committed by itself.

        It needs another connection, so not too many may do this at once.
        """
        token = _shared.set(None)
        try:
            yield
        finally:
            _shared.reset(token)

    async def fetch(self, query: LiteralString, **params: Any) -> list[Row]:
        """The rows of one statement, outside any transaction."""
        async with self.connection() as connection:
            return await (await connection.execute(query, params)).fetchall()

    async def fetch_one(self, query: LiteralString, **params: Any) -> Row | None:
        """The first row of one statement, outside any transaction."""
        async with self.connection() as connection:
            return await (await connection.execute(query, params)).fetchone()

    async def execute(self, query: LiteralString, **params: Any) -> None:
        async with self.connection() as connection:
            await connection.execute(query, params)


async def fetch_one(source: Database | Connection, query: LiteralString, **params: Any) -> Row | None:
    """The first row of one statement: inside a connection's transaction, or outside any."""
    if isinstance(source, Database):
        return await source.fetch_one(query, **params)
    return await (await source.execute(query, params)).fetchone()


_shared: ContextVar[tuple[Database, Connection] | None] = ContextVar("shared", default=None)


async def _configure(connection: Connection) -> None:
    set_json_loads(msgspec.json.decode, connection)
    set_json_dumps(msgspec.json.encode, connection)


async def connect_problem(url: str) -> str:
    """Why a connection fails, in the driver's own words and without the password."""
    try:
        connection = await psycopg.AsyncConnection.connect(url, connect_timeout=5)
    except psycopg.Error as error:
        return str(error).strip() or type(error).__name__
    await connection.close()
    return "timed out"


@asynccontextmanager
async def open_database(settings: Settings, *, max_connections: int = 16) -> AsyncIterator[Database]:
    """The configured database, migrated; the embedded server is started (or joined) when no URL is set."""
    from taskyard.db import migrate
    from taskyard.db.embedded import EmbeddedPostgres

    server, keeper = None, None
    if settings.database_url is None:
        server = EmbeddedPostgres(settings.data_dir)
        url = await server.start()
        keeper = asyncio.create_task(server.keep(), name="keep PostgreSQL")
    else:
        url = settings.database_url.get_secret_value()
    try:
        await asyncio.to_thread(migrate.upgrade, url)
        database = Database(url, max_connections=max_connections)
        await database.open()
        try:
            yield database
        finally:
            await database.close()
    finally:
        if server is not None and keeper is not None:
            keeper.cancel()
            await asyncio.wait({keeper})
            await server.stop()
