"""Which data folder this is: a worker that finds a run knows by it whether the run's sandbox can still be here."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def place_of(data_dir: Path) -> str:
    """The random name of a data folder, made when it is first asked for."""
    path = data_dir / "place"
    with suppress(FileNotFoundError):
        return path.read_text("ascii").strip()
    part = path.with_name(f"place.{secrets.token_hex(6)}.part")
    part.write_text(secrets.token_hex(16) + "\n", "ascii")
    try:
        with suppress(FileExistsError):  # another process was faster
            os.link(part, path)
    finally:
        part.unlink()
    return path.read_text("ascii").strip()
