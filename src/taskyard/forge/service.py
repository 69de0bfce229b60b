"""Which repository a task's `org/repo` means."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from taskyard.accounts.caller import Caller
from taskyard.db.engine import Connection, Database
from taskyard.errors import InvalidInputError, PermissionDeniedError
from taskyard.forge import store
from taskyard.forge.git import Origin, check_origin

DEFAULT_ORIGIN = "https://github.com/{name}.git"
"""Where a repository lives that nobody registered."""


async def register(
    connection: Connection, caller: Caller, data_dir: Path, origin_text: str, name: str | None
) -> tuple[dict[str, Any], bool]:
    """Give an origin a name that tasks can use; the entry, and whether it is new.

    A path on the server's own disk needs a user who administers the site: it opens the server's files. One
    below `data_dir` is refused: agents write there.
    """
    if origin_text.startswith("/") and not caller.is_staff:
        # Before the path is looked at: others must not learn what exists here.
        raise PermissionDeniedError("Only a user who administers this server may register a local path.")
    origin = check_origin(origin_text, outside=[data_dir])
    if name is None:
        name = await store.name_of(connection, caller.project.id, origin.location)
        if name is not None:
            return {"name": name, "origin": origin.display}, False
        name = await _free_name(connection, caller.project.id, suggested_name(origin))
    new = await store.register(connection, caller.project.id, name, origin.location, caller.user_id)
    return {"name": name, "origin": origin.display}, new


def suggested_name(origin: Origin) -> str:
    """`local/<folder>` for a path, the last two parts of a URL's path otherwise."""
    path = PurePosixPath(origin.location if origin.kind == "path" else urlsplit(origin.location).path)
    parts = [re.sub(r"[^a-z0-9._-]+", "-", part.lower()) for part in path.parts if part != "/"]
    repository = parts[-1].removesuffix(".git") if parts else ""
    if not repository:
        raise InvalidInputError("The origin has no name of its own: give one as `name`.", attr="name")
    organization = "local" if origin.kind == "path" or len(parts) < 2 else parts[-2]
    return f"{organization}/{repository}"


async def _free_name(connection: Connection, project_id: int, wanted: str) -> str:
    name, number = wanted, 2
    while await store.taken(connection, project_id, name):
        name, number = f"{wanted}-{number}", number + 1
    return name


async def resolve(database: Database, data_dir: Path, project_id: int, name: str) -> Origin:
    """The origin of a task's repository: the registered one, else the one on GitHub."""
    location = await store.origin_of(database, project_id, name)
    return check_origin(location or DEFAULT_ORIGIN.format(name=name), outside=[data_dir])
