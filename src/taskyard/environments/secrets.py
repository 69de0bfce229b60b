"""Which key encrypts, and its replacement.

The database knows the fingerprint of the key in use, so that a machine with another one refuses to
encrypt at once, instead of writing what no other machine can read. Keys are read anew each time: a
rotation reaches running servers without a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from taskyard.db.engine import Connection, Database
from taskyard.environments import store
from taskyard.security import Box, SecretKeyError, add_file_key, keep_file_key, secret_keys
from taskyard.settings import Settings


async def sealing_box(connection: Connection, settings: Settings) -> Box:
    """The box to encrypt with in this transaction. Makes the site's first key when there is none.

    Raises SecretKeyError when this machine lacks the key that the site's secrets are encrypted with.
    """
    # Not the weaker lock first: two transactions that both want the stronger one would wait for each other.
    first = await store.key_mark(connection, "") is None
    mark = await store.key_mark(connection, "update" if first else "share")
    box = await asyncio.to_thread(lambda: Box(secret_keys(settings, create=mark is None)))
    if mark is None:
        await store.set_key_mark(connection, box.fingerprints[0])
    elif mark not in box.fingerprints:
        raise SecretKeyError(
            "This machine's key is not the one that the site's secrets are encrypted with. Every machine of a site "
            "needs the same TASKYARD_SECRET_KEYS; the machine that wrote the first secret has it in its setting or "
            "its key file."
        )
    return box


async def opening_box(settings: Settings) -> Box:
    """The box to decrypt with; raises SecretKeyError when this machine has no key."""
    return await asyncio.to_thread(lambda: Box(secret_keys(settings)))


async def opened(settings: Settings, sealed: Callable[[], Awaitable[bytes | None]]) -> str | None:
    """A stored secret, decrypted; `sealed` reads it. None when there is none, SecretKeyError when no key fits."""
    text = await sealed()
    while text is not None:
        box = await opening_box(settings)
        try:
            return box.open(text)
        except SecretKeyError:
            # A rotation may have finished since it was read: the old key is gone, and the text another one.
            again = await sealed()
            if again == text:
                raise
            text = again
    return None


async def rotate(database: Database, settings: Settings, *, drop_unreadable: bool = False) -> dict[str, Any]:
    """Encrypt everything anew: with the first of the settings' keys, or with a new key file when they name none.

    With `drop_unreadable`, secrets whose key is lost are removed; otherwise they are a SecretKeyError and
    nothing changes. The answer: how many are encrypted anew, and what was removed.
    """
    own_file = not settings.secret_keys
    rotated, dropped = 0, []
    async with database.transaction() as connection:
        # Whoever encrypts holds this row, so nobody does with the old key from here on.
        await store.key_mark(connection, "update")
        if own_file:
            await asyncio.to_thread(add_file_key, settings)
        box = await opening_box(settings)
        for place in store.PLACES:
            for row in await store.lock_sealed(connection, place):
                what = f"{place.what} {row['id']}"
                try:
                    text = box.open(bytes(row["sealed"]))
                except SecretKeyError as error:
                    if not drop_unreadable:
                        raise SecretKeyError(
                            f"The {what} cannot be decrypted with the keys of this machine. Add their key to "
                            "TASKYARD_SECRET_KEYS, or give --drop-unreadable to remove what cannot be read."
                        ) from error
                    await store.drop_sealed(connection, place, row["id"])
                    dropped.append(what)
                else:
                    await store.reseal(connection, place, row["id"], box.seal(text))
                    rotated += 1
        await store.set_key_mark(connection, box.fingerprints[0])
    if own_file:
        async with database.transaction() as connection:
            # Under the lock again: another rotation may be between its new key file and its commit.
            if mark := await store.key_mark(connection, "update"):
                await asyncio.to_thread(keep_file_key, settings, mark)
    return {"rotated": rotated, "dropped": dropped}
