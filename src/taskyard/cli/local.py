"""Which server the client commands talk to, and with which key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from taskyard.cli.options import load_settings
from taskyard.errors import SetupError

if TYPE_CHECKING:
    from taskyard.client import Taskyard


def connect(data_dir: Path | None = None) -> Taskyard:
    """A client for TASKYARD_URL with TASKYARD_API_KEY, or for the server of the data folder with its first key.

    The first key is for that server alone: it is never sent to another address.
    """
    url = os.environ.get("TASKYARD_URL", "").strip()
    key = os.environ.get("TASKYARD_API_KEY", "").strip()
    if not url or not key:
        folder = load_settings(data_dir).data_dir
        local = server_url(folder)
        if not url and local is None:
            raise SetupError(
                f"no Taskyard server is running here ({folder} names none). "
                "Start one with `taskyard serve`, or set TASKYARD_URL and TASKYARD_API_KEY."
            )
        if not url or url.rstrip("/") == local:
            url, key = url or str(local), key or first_key(folder)
        else:
            raise SetupError(f"no API key for {url}: set TASKYARD_API_KEY.")
    from taskyard.client import Taskyard

    return Taskyard(url, key)


def server_url(folder: Path) -> str | None:
    """The URL of the server that runs on a data folder; None when none does."""
    try:
        state = json.loads((folder / "server.json").read_text("utf-8"))
        url, pid = str(state["url"]), int(state["pid"])
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise SetupError(_forbidden(folder / "server.json")) from error
    except (OSError, ValueError, KeyError, TypeError):
        return None  # half written, or not ours
    return url if _alive(pid) else None


def first_key(folder: Path) -> str:
    """The API key that the server made for its first user."""
    path = folder / "first-key"
    try:
        return path.read_text("utf-8").strip()
    except FileNotFoundError:
        raise SetupError(f"no API key: set TASKYARD_API_KEY ({path} is not there).") from None
    except OSError as error:
        raise SetupError(_forbidden(path)) from error


def _forbidden(path: Path) -> str:
    return f"cannot read {path}: it belongs to the user who runs the server. Set TASKYARD_URL and TASKYARD_API_KEY."


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
