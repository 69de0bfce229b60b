"""`--repo`: from what a person names to the name that a task uses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from taskyard.errors import SetupError

if TYPE_CHECKING:
    from taskyard.client import Taskyard

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|[^/\s]+@[^/\s:]+:", re.IGNORECASE)
_NAME = re.compile(r"[^/\s.~][^/\s]*/[^/\s]+")


def repository_name(yard: Taskyard, wanted: str) -> str:
    """The repository's name on the server, registered there when it is a URL or a folder.

    `org/name` that is no folder here is taken as a name that the server knows. A folder is on this machine
    and the server's: SetupError when it is no git repository.
    """
    if _URL.match(wanted):
        return yard.register_repository(wanted).name
    folder = Path(wanted).expanduser()
    if not folder.exists() and _NAME.fullmatch(wanted):
        return wanted
    return yard.register_repository(str(_root(folder))).name


def _root(folder: Path) -> Path:
    """The top folder of the git repository at or above a folder."""
    if not folder.exists():
        raise SetupError(f"--repo {folder}: there is no such folder.")
    if not folder.is_dir():
        raise SetupError(f"--repo {folder}: this is a file; name the folder of a git repository.")
    bare = _git(folder, "rev-parse", "--is-bare-repository")
    if bare is None:
        raise SetupError(f"--repo {folder}: this is not a git repository (make it one with `git init`).")
    root = Path(
        _git(folder, "rev-parse", "--absolute-git-dir" if bare == "true" else "--show-toplevel") or folder
    )
    if _git(root, "rev-parse", "--verify", "--quiet", "HEAD") is None:
        raise SetupError(f"--repo {folder}: the repository has no commit yet.")
    if bare != "true" and _git(root, "status", "--porcelain", "--untracked-files=no"):
        typer.echo(f"note: changes in {root} that are not committed are not part of the run", err=True)
    return root


def _git(folder: Path, *words: str) -> str | None:
    """What git says about a folder of this user; None when it fails. SetupError for a folder git distrusts."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False, timeout=30
        )
    except FileNotFoundError:
        raise SetupError("git is not installed.") from None
    if done.returncode:
        if "dubious ownership" in done.stderr:
            raise SetupError(f"--repo {folder}: the repository belongs to another user; run as its owner.")
        return None
    return done.stdout.strip()
