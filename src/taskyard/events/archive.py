"""The part of a record that is in object storage: how it looks there, and how it is read.

The object is gzip; unpacked, each line is one entry as a JSON array `[number, milliseconds, shown, kind, stamp in
microseconds or null, text]`. It is made of blocks that can be read alone, and the database knows where they end,
so no more than a block is in memory, and reading begins near the entry that is wanted.
"""

from __future__ import annotations

import asyncio
import gzip
from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import msgspec

from taskyard.events.entries import Filter, Shown
from taskyard.objects.interface import ObjectStore, StorageError

BLOCK_BYTES = 128 * 1024
"""Text of a block; only one that has a single entry is larger."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


class Archived(msgspec.Struct, frozen=True, kw_only=True):
    """What the database knows of the archived part of a record."""

    key: str
    last_seq: int
    """It has all entries up to this number."""
    last_ms: int
    """When the last of them was written, in milliseconds."""
    log_entries: int
    """How many of them the log shows."""
    talked: bool
    block_seqs: list[int]
    """The number of the last entry of each block."""
    block_ends: list[int]
    """The byte behind each block."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """An archived entry."""

    seq: int
    at_ms: int
    shown: int
    kind: str | None
    stamp: int | None
    data: str


class ArchiveLostError(StorageError):
    """The archived log of this run is not in the object storage. Restore it from a backup."""


def matching(items: Sequence[Item], wanted: Filter, shown: Shown, last: int) -> list[Item]:
    """Those of the items up to the number `last` that a filter wants, as `store.MATCHES` asks it of rows."""
    after = None if wanted.after is None else (wanted.after - EPOCH) // MICROSECOND
    kinds, without = frozenset(wanted.kinds), frozenset(wanted.without)
    mask = int(shown)  # operators of flags are slow
    return [
        item
        for item in items
        if item.shown & mask
        and item.seq <= last
        and (after is None or (item.stamp is not None and item.stamp > after))
        and (not kinds or (item.kind or "") in kinds)
        and (item.kind or "") not in without
    ]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Item)


def pack(items: Sequence[Item]) -> bytes:
    """A block."""
    return gzip.compress(_encoder.encode_lines(items), 6, mtime=0)


def unpack(block: bytes) -> list[Item]:
    return _decoder.decode_lines(gzip.decompress(block))


async def blocks(objects: ObjectStore, archived: Archived, after: int) -> AsyncGenerator[list[Item], None]:
    """The entries above the number `after`, block by block. Raises StorageError."""
    first = bisect_right(archived.block_seqs, after)
    if first == len(archived.block_seqs):
        return
    position = archived.block_ends[first - 1] if first else 0
    content = await objects.open(archived.key, start=position)
    if content is None:
        raise ArchiveLostError
    ends = iter(archived.block_ends[first:])
    end = next(ends)
    async with aclosing(content.chunks) as chunks:
        held = bytearray()
        async for chunk in chunks:
            held += chunk
            while len(held) >= end - position:
                items = await asyncio.to_thread(unpack, bytes(held[: end - position]))
                del held[: end - position]
                yield [item for item in items if item.seq > after] if items[0].seq <= after else items
                position, end = end, next(ends, 0)
                if not end:
                    return
    raise ArchiveLostError("The archived log of this run is cut short in the object storage.")
