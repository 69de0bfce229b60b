"""Search: a part of the title or of the description, or the number at the end of the term (tasks-api §4.1).

Newest tasks come first in every list, so the search looks at the newest first, and stops when it knows enough:
it reads the texts of the newest tasks, then asks the index, a few blocks of it at a time. A list that its other
filters make short is just read.
"""

from __future__ import annotations

import math

from taskyard.db.engine import Connection, Row
from taskyard.tasks import search_store, store
from taskyard.tasks.filters import Where

READ = 2000
"""As many of the newest texts are read without the index: about 2 ms."""
READ_ON = 8000
"""As many more, when they are likely to have enough matches."""
SAFETY = 1.2
"""So much more is taken than seems to be enough."""
SHORT = 10_000
"""A list of up to so many tasks is read as a whole: about 10 ms."""
PARTS = 8
"""As many parts of a term the index is asked for."""


async def search(
    connection: Connection, where: Where, term: str, limit: int, offset: int, *, count_limit: int
) -> tuple[list[Row], int]:
    """One page of the matching tasks of a list, newest first, and their count.

    The count is exact up to `count_limit` (0: always). Beyond it is the smallest that says so: one more than
    `count_limit` and than the end of the page.
    """
    enough = max(count_limit, offset + limit) + 1 if count_limit else None
    numbers = await _matching(connection, where, term, enough)
    rows = await store.numbered(connection, where, numbers[offset : offset + limit])
    return rows, len(numbers)


async def _matching(connection: Connection, where: Where, term: str, enough: int | None) -> list[int]:
    """Numbers of the newest matching tasks, newest first; all of them, or `enough`."""
    extent = await search_store.extent(connection, where, term)
    pattern, grams = f"%{escaped(extent['term'])}%", parts(extent["term"])
    found: set[int] = set()
    if (number := number_in(term)) is not None:
        found.update(await search_store.one(connection, where, number))
    short = extent["total"] is not None and extent["total"] <= SHORT
    bottom = 0 if short else max(extent["top"] - READ, 0)
    found.update(await search_store.read(connection, where, pattern, bottom, None, enough))
    if bottom and enough is not None and found:
        # A term that is in many texts: the next ones should hold the rest, if they are like the others.
        rest = math.ceil((enough - len(found)) * READ / len(found) * SAFETY)
        if 0 < rest <= READ_ON:
            top, bottom = bottom, max(bottom - rest, 0)
            found.update(await search_store.read(connection, where, pattern, bottom, top, enough))
    last, width = (bottom - 1) >> search_store.BLOCK_BITS, 1
    while last >= 0 and (enough is None or len(found) < enough):
        first = 0 if enough is None else max(last - width + 1, 0)
        before = len(found)
        found.update(
            await search_store.look_up(connection, where, pattern, grams, (first, last), bottom, enough)
        )
        if enough is not None and (more := len(found) - before):
            # Likewise for blocks.
            width = math.ceil((enough - len(found)) * (last - first + 1) / more * SAFETY)
        else:
            width = last + 1
        last = first - 1
    return sorted(found, reverse=True)[:enough]


def number_in(term: str) -> int | None:
    """The number that a term may stand for: what comes after its last dash, whatever the prefix says."""
    digits = term.rpartition("-")[2]
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        return None
    return int(digits)


def escaped(term: str) -> str:
    """A term as a literal part of a LIKE pattern."""
    return term.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def parts(term: str) -> list[str]:
    """Groups of four characters of a term, at most PARTS, from all over it; a shorter term is its own part."""
    count = len(term) - 3
    if count < 1:
        return [term]
    step = max(count / PARTS, 1)
    starts = [int(n * step) for n in range(min(count, PARTS))]
    return list(dict.fromkeys(term[start : start + 4] for start in starts))
