"""Hold the tests' PostgreSQL for one test process: `python postgres_keeper.py LOCK FOLDER`.

Prints the server's URL, then waits for the end of its standard input. The system closes that pipe
however the test process ends, so a killed session leaves no server behind. The keeper that leaves
last removes the folder.
"""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskyard.db.embedded import EmbeddedPostgres, running_url

SETTINGS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}
"""The data of tests need not survive a crash. Autovacuum would visit template databases."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One keeper at a time: the folder must not be removed while another one starts there."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(lock: Path, folder: Path) -> None:
    server = EmbeddedPostgres(folder, settings=SETTINGS)
    with locked(lock):
        print(asyncio.run(server.start()), flush=True)
    sys.stdin.read()
    with locked(lock):
        asyncio.run(server.stop())
        if running_url(folder) is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
