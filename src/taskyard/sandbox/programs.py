"""Which host files a command needs that a sandbox does not have anyway.

A sandbox has the host's /usr (and /bin, /lib…). Agents often live elsewhere: a Node.js or Python of the
user's own, an npm package, a virtual environment. The files are mounted read-only where they are on the
host, symbolic links as links, so that a program finds its library as it does there.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from taskyard.sandbox.provider import HOME, WORKSPACE, Mount, SandboxError

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Host folders that every sandbox has."""
SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
"""PATH inside."""

_BESIDE_BIN = ("lib", "lib64", "libexec", "pyvenv.cfg")
_NOT_FILES = ("/proc", "/dev", "/sys")
_MAX_LINKS = 40  # as the kernel


def program_mounts(argv: Sequence[str]) -> tuple[list[str], tuple[Mount, ...]]:
    """The mounts that a command needs inside, and the command.

    argv[0], and each item that is an absolute path of this host. A bare argv[0] is looked for where the
    sandbox looks, then on the server's own PATH; in the second case the returned command names its path.
    An executable brings the library folders beside its `bin`, and a virtual environment its base. A file in
    a node_modules folder brings the outermost such folder. Never mounted: /, a folder right below it, a
    home folder, or a folder that one of these is in.

    Raises SandboxError when a bare argv[0] is found nowhere.
    """
    if not argv:
        raise ValueError("a command has at least one item")
    command = list(argv)
    found: dict[str, Mount] = {}
    if "/" not in command[0]:
        command[0] = _look_up(command[0])
    if command[0].startswith("/") and Path(command[0]).is_file():
        _add(found, _executable(Path(os.path.normpath(command[0]))))
    for item in command[1:]:
        if item.startswith("/") and "\0" not in item:
            _add(found, _named(Path(os.path.normpath(item))))
    return command, tuple(_without_covered(found))


def named_files(argv: Sequence[str]) -> tuple[Mount, ...]:
    """The files of this host that a command names besides its program, for a sandbox with programs of its own."""
    found = {
        item: Mount(Path(item), item)
        for item in argv[1:]
        if item.startswith("/")
        and "\0" not in item
        and not _is_there_anyway(Path(item))
        and Path(item).is_file()
    }
    return tuple(found.values())


def _look_up(name: str) -> str:
    if shutil.which(name, path=SEARCH_PATH):
        return name
    path = shutil.which(name)
    if path is None:
        raise SandboxError(f"the program {name!r} is not installed: it is nowhere on PATH")
    return str(Path(path).absolute())


def _add(found: dict[str, Mount], mounts: Iterator[Mount]) -> None:
    for mount in mounts:
        found.setdefault(mount.target, mount)


def _named(path: Path) -> Iterator[Mount]:
    """A path that a command names: script, configuration file, folder, another program."""
    if _is_there_anyway(path) or any(path.is_relative_to(inside) for inside in (WORKSPACE, HOME)):
        return
    if path.is_dir():
        if not _is_too_wide(path):
            yield _same(path)
    elif path.is_file():
        if os.access(path, os.X_OK):
            yield from _executable(path)
        else:
            yield from _chain(path)


def _executable(path: Path, *, script: bool = True) -> Iterator[Mount]:
    """An executable, with what each step of its chain of links has beside it. script: it may be one."""
    for mount in _chain(path):
        yield mount
        hop = Path(mount.target)
        if hop.parent.name == "bin" and not _is_too_wide(prefix := hop.parent.parent):
            for name in _BESIDE_BIN:
                if (prefix / name).exists():
                    yield _same(prefix / name)
            yield from _base_of_environment(prefix / "pyvenv.cfg", hop.name)
        if script and not mount.symlink:
            yield from _interpreter(hop)


def _chain(path: Path) -> Iterator[Mount]:
    """A file: each link on the way to it as a link, then the file itself."""
    for _ in range(_MAX_LINKS):
        if _is_there_anyway(path):
            return
        if not path.is_symlink():
            package = _package_folder(path)
            yield _same(package or path)
            return
        # Links in folder names on the way are resolved here, since inside those folders are plain ones.
        text = path.parent.resolve() / path.readlink()
        following = text.parent.resolve() / text.name
        yield Mount(following, str(path), symlink=True)
        path = following


def _base_of_environment(config: Path, name: str) -> Iterator[Mount]:
    """The interpreter that a virtual environment was made from (`home = …/bin` in pyvenv.cfg)."""
    if not config.is_file():
        return
    for line in config.read_text("utf-8", "replace").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "home":
            for candidate in (name, "python3"):
                base = Path(value.strip()) / candidate
                if base.is_file() and base.parent.parent != config.parent:
                    yield from _executable(base)
                    return


def _interpreter(script: Path) -> Iterator[Mount]:
    """The program named by a script's first line."""
    try:
        with script.open("rb") as file:
            first = file.readline(256)
    except OSError:
        return
    words = first[2:].split() if first.startswith(b"#!") else []
    if words and words[0].startswith(b"/"):
        path = Path(os.path.normpath(os.fsdecode(words[0])))
        if path.is_file():
            yield from _executable(path, script=False)


def _package_folder(path: Path) -> Path | None:
    """The outermost node_modules folder that a file is in."""
    for folder in reversed(path.parents):
        if folder.name == "node_modules":
            return folder
    return None


def _same(path: Path) -> Mount:
    return Mount(path, str(path))


def _without_covered(found: dict[str, Mount]) -> Iterator[Mount]:
    """Outer folders first, and nothing twice that an outer folder brings along at its own place."""
    whole: list[PurePosixPath] = []
    for target in sorted(found):
        path = PurePosixPath(target)
        if any(folder in path.parents for folder in whole):
            continue
        yield found[target]
        if not found[target].symlink and found[target].source.is_dir():
            whole.append(path)


def _is_there_anyway(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in (*SYSTEM, *_NOT_FILES))


def _is_too_wide(folder: Path) -> bool:
    """Whether a folder is, or holds, what no sandbox must see as a whole."""
    if len(folder.parts) <= 2:
        return True
    homes = [Path(entry.pw_dir) for entry in pwd.getpwall()] + [Path.home()]
    return any(home.is_relative_to(folder) for home in homes)
