"""A database that is away for a while, as in a restart or a failover."""

from __future__ import annotations

import asyncio

import psycopg
from psycopg import sql

from taskyard.db.engine import Database


async def outage(database: Database, seconds: float) -> None:
    """End every connection to the database and let no new one in."""
    name = psycopg.conninfo.conninfo_to_dict(database.url)["dbname"]
    assert isinstance(name, str)
    head, options = database.url.split("?", 1)
    server = f"{head.rsplit('/', 1)[0]}/postgres?{options}"
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    async with await psycopg.AsyncConnection.connect(server, autocommit=True) as connection:
        await connection.execute(allow.format(sql.Identifier(name), sql.Literal(False)))
        try:
            end = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < end:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
                )
                await asyncio.sleep(0.2)
        finally:
            await connection.execute(allow.format(sql.Identifier(name), sql.Literal(True)))
