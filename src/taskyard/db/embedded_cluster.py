"""The cluster of the embedded PostgreSQL: its creation, its owner, its socket, and its complaints."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

from taskyard.confine import Identity
from taskyard.db.embedded_files import FileLock, disk_full, make_private
from taskyard.db.embedded_programs import MAJOR, Programs, environment
from taskyard.errors import SetupError

INITIAL_SETTINGS = {
    "shared_buffers": "64MB",
    "max_connections": "200",
    "max_wal_size": "512MB",
    "jit": "off",  # compiling costs more than short statements gain
    "io_method": "sync",  # else three more processes
    "max_logical_replication_workers": "0",  # else one more process
    "log_checkpoints": "off",
    "log_min_error_statement": "panic",  # no statement texts in the log
    "timezone": "UTC",
    "log_timezone": "UTC",
}
"""Written to postgresql.conf of a new cluster, where an administrator may change them.

fsync and synchronous_commit keep their default, on. wal_level stays `replica`: `minimal` gains nothing
for short transactions and would forbid pg_basebackup.
"""
PORT = 5432
"""Part of the socket's name only; no TCP port is opened."""
SOCKET_PATH_LIMIT = 103 if sys.platform == "darwin" else 107
"""Bytes of a Unix socket's path (`sun_path` without its last NUL)."""


def create_cluster(folder: Path, programs: Programs, lock: FileLock) -> Path:
    """The cluster `folder/data`, created when missing; SetupError when this program cannot open it.

    initdb inherits the lock, so that nobody disturbs one that outlived its starter.
    """
    data = folder / "data"
    version = data / "PG_VERSION"
    if version.exists():
        found = version.read_text("ascii").strip()
        if found != str(MAJOR):
            raise SetupError(
                f"{data} was made by PostgreSQL {found}, this Taskyard brings {MAJOR}: start the Taskyard "
                "that made it, save the database with pg_dump, and restore it into a new data folder"
            )
        give(data, programs.identity)
        return data
    if data.exists() and any(data.iterdir()):
        raise SetupError(f"{data} is neither empty nor a PostgreSQL cluster: move it away")
    # initdb writes PG_VERSION early: only a folder that has its final name is complete.
    new = folder / "data.new"
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(mode=0o700)
    give(new, programs.identity)
    (seen,) = programs.seen(new)
    arguments = ["--pgdata", seen, "--username", "postgres", "--encoding", "UTF8", "--no-instructions"]
    arguments += ["--auth-local", "trust", "--auth-host", "reject"]
    # PostgreSQL's own locale: indexes do not depend on the version of the system's C library.
    arguments += ["--no-locale", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
    arguments += [f"--set={name}={value}" for name, value in INITIAL_SETTINGS.items()]
    # initdb syncs what it wrote (0.1 s); without that a power failure could leave a broken cluster.
    done = subprocess.run(
        programs.command("initdb", arguments, new),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        cwd="/",
        pass_fds=(lock.fileno(),),
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(new, ignore_errors=True)
        raise explained("cannot create the PostgreSQL cluster", done.stdout, folder)
    new.rename(data)
    _sync(folder)
    return data


def give(folder: Path, identity: Identity | None) -> None:
    """Give a folder to the user that runs PostgreSQL, also after a move from another machine."""
    if identity is None or folder.stat().st_uid == identity.uid:
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(parent, name), identity.uid, identity.gid, follow_symlinks=False)
    os.chown(folder, identity.uid, identity.gid)  # last: an interrupted change is done again


def url(sockets: Path, database: str) -> str:
    """The libpq URL of a database. It names the port: PGPORT must not choose another socket."""
    return f"postgresql:///{database}?host={quote(str(sockets), safe='/')}&port={PORT}&user=postgres"


def create_socket_folder(folder: Path, programs: Programs) -> Path:
    """`folder/run`, or a private folder with a short path when that one is too long for a socket."""
    chosen = folder / "run"
    if len(os.fsencode(chosen / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_LIMIT:
        make_private(chosen)
    elif (remembered := _remembered(folder)) is not None:
        chosen = remembered
    else:
        chosen = Path(tempfile.mkdtemp(prefix="taskyard-", dir="/tmp"))
        (folder / "socket-folder").write_text(str(chosen), "utf-8")
    give(chosen, programs.identity)
    return chosen


def socket_folder(folder: Path) -> Path:
    """Where the server's socket is if the server runs."""
    return _remembered(folder) or folder / "run"


def forget_socket_folder(folder: Path) -> None:
    """Remove the short folder of a server that ended."""
    if (short := _remembered(folder)) is not None:
        shutil.rmtree(short, ignore_errors=True)
        (folder / "socket-folder").unlink(missing_ok=True)


def explained(what: str, printed: str, folder: Path) -> SetupError:
    """The error for a program that failed, from what it printed."""
    for line in printed.splitlines():
        full = "No space left on device" in line or "Disk quota exceeded" in line
        if full and "shared memory" not in line:
            return disk_full(folder)
    if re.search(r"^(unshare|mount): .*(not permitted|denied)", printed, re.IGNORECASE | re.MULTILINE):
        what += (
            ". Root needs mount namespaces (CAP_SYS_ADMIN) to run it as another user, and containers often "
            "forbid them: start Taskyard as an ordinary user, or set TASKYARD_DATABASE_URL"
        )
    return SetupError(f"{what}. It printed:\n{printed[-3000:].strip() or '(nothing)'}")


def _remembered(folder: Path) -> Path | None:
    """The short folder that an earlier start made, if it is still there and still private."""
    try:
        short = Path((folder / "socket-folder").read_text("utf-8"))
        found = short.lstat()
        owners = (folder.stat().st_uid, (folder / "data").stat().st_uid)
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid in owners
    return short if private else None


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
