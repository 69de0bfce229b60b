"""SQL of the search. What matches is always decided by LIKE on `task_search.text`; the index only narrows."""

from __future__ import annotations

from typing import LiteralString

from psycopg.rows import scalar_row

from taskyard.db.engine import Connection, Row
from taskyard.tasks import store
from taskyard.tasks.filters import Where

BLOCK_BITS = 14
"""Tasks of one block of the index, as a power of two: the same as in `search_lexemes`."""


async def extent(connection: Connection, where: Where, term: str) -> Row:
    """`term` as texts are stored; `top`, above all numbers of the project; `total` tasks of the list.

    `total` is None when it is not much smaller than the project, or not known without counting.
    """
    total: LiteralString = "(" + store.counting(where) + ")"
    row = await (
        await connection.execute(
            "SELECT search_text(%(term)s) AS term, p.next_task_number AS top, "
            + (total if where.filters and not where.stage else "NULL")
            + " AS total FROM projects p WHERE p.id = %(project)s",
            {**where.parameters, "term": term},
        )
    ).fetchone()
    assert row is not None
    return row


async def one(connection: Connection, where: Where, number: int) -> list[int]:
    """The number itself if its task is in the list."""
    return await _numbers(
        connection,
        "SELECT t.task_number FROM tasks t WHERE t.task_number = %(number)s AND " + where.sql,
        where,
        number=number,
    )


async def read(
    connection: Connection, where: Where, pattern: str, least: int, below: int | None, most: int | None
) -> list[int]:
    """Numbers of matching tasks from `least` on and below `below`, at most `most`, newest first.

    It reads the texts of the list.
    """
    return await _numbers(
        connection,
        "SELECT t.task_number FROM tasks t"
        " JOIN task_search s ON s.project_id = t.project_id AND s.task_number = t.task_number WHERE "
        + where.sql
        + " AND t.task_number >= %(least)s AND s.task_number >= %(least)s"
        + ("" if below is None else " AND t.task_number < %(below)s AND s.task_number < %(below)s")
        + " AND s.text LIKE %(pattern)s"
        " ORDER BY t.task_number DESC LIMIT %(most)s",
        where,
        least=least,
        below=below,
        pattern=pattern,
        most=most,
    )


async def look_up(
    connection: Connection,
    where: Where,
    pattern: str,
    grams: list[str],
    blocks: tuple[int, int],
    below: int,
    most: int | None,
) -> list[int]:
    """Numbers of matching tasks in blocks of the index and below a number, at most `most`, newest first."""
    return await _numbers(
        connection,
        "SELECT t.task_number FROM search_blocks(%(project)s, %(first)s, %(last)s, %(grams)s, %(pattern)s)"
        " AS found (number)"
        " JOIN tasks t ON t.project_id = %(project)s AND t.task_number = found.number"
        " WHERE found.number < %(below)s AND " + where.sql + " ORDER BY t.task_number DESC LIMIT %(most)s",
        where,
        first=blocks[0],
        last=blocks[1],
        grams=grams,
        pattern=pattern,
        below=below,
        most=most,
    )


async def _numbers(
    connection: Connection, query: LiteralString, where: Where, **parameters: object
) -> list[int]:
    async with connection.cursor(row_factory=scalar_row) as cursor:
        # Planned with the values: how many tasks they leave differs by orders of magnitude.
        await cursor.execute(query, {**where.parameters, **parameters}, prepare=False)
        return await cursor.fetchall()
