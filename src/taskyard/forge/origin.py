"""Where a repository lives: a folder of this host or an HTTP(S) URL, and what is refused as such."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from taskyard.errors import InvalidInputError

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class InvalidOriginError(InvalidInputError):
    """This is not a repository that Taskyard can use."""

    code = "invalid_origin"


@dataclass(frozen=True)
class Origin:
    """A checked origin. Make it with `check_origin`."""

    kind: Literal["path", "url"]
    location: str
    """What git is given: an absolute path without symbolic links, or a URL without user information."""
    display: str
    """What people are shown."""

    @property
    def takes_credentials(self) -> bool:
        """Whether a token may be sent there: over TLS, or to this host."""
        if self.kind == "path":
            return False
        parts = urlsplit(self.location)
        return parts.scheme == "https" or parts.hostname in _LOOPBACK

    def far_side(self, service: Literal["upload-pack", "receive-pack"]) -> list[str]:
        """The option that makes git serve a local origin that belongs to somebody else; else nothing.

        git refuses a repository of another user, and it hands no configuration of ours to the program on
        the far side, so that program has to be named. A server that is root runs it as the owner: hooks
        and settings of the origin then act with its owner's rights, and what is pushed belongs to the
        owner. Any other server trusts exactly this one folder.
        """
        if self.kind == "url":
            return []
        folder = _git_folder(Path(self.location))
        if folder is None:
            return []
        status = folder.stat()
        if status.st_uid == os.geteuid():
            return []
        if os.geteuid() == 0:
            ids = f"--reuid={status.st_uid} --regid={status.st_gid} --clear-groups --inh-caps=-all"
            return [f"--{service}=setpriv {ids} git {service}"]
        trusted = " ".join(
            shlex.join(["-c", f"safe.directory={path}"])
            for path in dict.fromkeys((self.location, str(folder)))
        )
        return [f"--{service}=git {trusted} {service}"]


def check_origin(text: str, *, outside: Sequence[Path] = ()) -> Origin:
    """An origin from what a person typed: the absolute path of a git repository, or an http(s) URL.

    outside: folders whose content agents can write (the data folder); a path within is refused.
    Raises InvalidOriginError. Reads a few file names; runs no git and opens no connection.
    """
    text = text.strip()
    if not text:
        raise InvalidOriginError(
            "The repository has no address. Give the path of a git repository or an https URL."
        )
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise InvalidOriginError(
            "The address of a repository cannot contain line breaks or control characters."
        )
    if text.startswith("-"):
        raise InvalidOriginError("The address of a repository cannot start with '-'.")
    if text.startswith("/"):
        return _check_path(text, outside)
    if re.match(r"https?://", text, re.IGNORECASE):
        return _check_url(text)
    if re.match(r"file:", text, re.IGNORECASE):
        raise InvalidOriginError("Give the plain path of a local repository, without 'file://'.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*::", text) or "://" in text:
        protocol = re.split(r"::|://", text, maxsplit=1)[0]
        raise InvalidOriginError(f"Protocol '{protocol[:40]}' is not supported. Use an https URL.")
    if re.match(r"[^/\s]+@[^/\s]+:|[^/\s:]+:", text):
        raise InvalidOriginError("SSH addresses are not supported. Use the https URL of the repository.")
    raise InvalidOriginError(
        "Give the absolute path of a local repository (it starts with '/') or an https URL."
    )


def _check_path(text: str, outside: Sequence[Path]) -> Origin:
    try:
        path = Path(text).resolve(strict=True)
    except (OSError, RuntimeError):
        raise InvalidOriginError(f"There is no folder {text} on the server, or it cannot be read.") from None
    try:
        folder = _git_folder(path)
    except PermissionError:
        raise InvalidOriginError(f"The server may not read {path}. Give its user read access.") from None
    if folder is None:
        raise InvalidOriginError(
            f"{path} is not a git repository: it has neither .git nor the files of a bare one."
        )
    # Both: `.git` may be a link or a file that points somewhere else.
    if any(
        place.resolve().is_relative_to(refused.resolve()) for place in (path, folder) for refused in outside
    ):
        raise InvalidOriginError("A folder inside the server's own data folder cannot be a repository.")
    return Origin("path", str(path), str(path))


def _git_folder(path: Path) -> Path | None:
    """What git serves when it is given this path: `.git` inside it, or the path itself if it is bare."""
    dot = path / ".git"
    if dot.is_file() and dot.stat().st_size < 8192:
        named = dot.read_text("utf-8", "replace").removeprefix("gitdir:").strip()
        return (path / named).resolve() if (path / named / "HEAD").is_file() else None
    for folder in (dot, path):
        if (folder / "HEAD").is_file() and (folder / "objects").is_dir() and (folder / "refs").is_dir():
            return folder
    return None


def _check_url(text: str) -> Origin:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidOriginError(f"This is not a valid URL: {error}.") from None
    if "@" in parts.netloc:
        raise InvalidOriginError("Leave user names, passwords and tokens out of the URL of a repository.")
    if not host or re.search(r"[\s\\]", text):
        raise InvalidOriginError(
            "This is not a valid URL: it has no host name, or a space or backslash in it."
        )
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise InvalidOriginError("The URL of a repository has no '?' or '#' part.")
    path = parts.path.rstrip("/")
    if not path:
        raise InvalidOriginError("The URL names a host but no repository on it.")
    if {".", ".."} & set(unquote(path).split("/")):
        raise InvalidOriginError("The URL of a repository has no '.' or '..' in its path.")
    name = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme.lower()}://{name}{f':{port}' if port is not None else ''}{path}"
    return Origin("url", url, url)
