"""The embedded PostgreSQL, with real servers: life, death, sharing, and what a bad machine does to it."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

import taskyard
from taskyard.confine import Identity, confined, staged
from taskyard.db import embedded_server
from taskyard.db.embedded import EmbeddedPostgres, ServeLock, running_url
from taskyard.db.embedded_cluster import socket_folder
from taskyard.db.embedded_files import FileLock
from taskyard.errors import SetupError

root_only = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: mounts a file system or changes the user"
)

CHILD = """
import asyncio, sys
from pathlib import Path
from taskyard.db.embedded import EmbeddedPostgres
async def main():
    server = EmbeddedPostgres(Path(sys.argv[1]))
    print(await server.start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()
asyncio.run(main())
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data folder that does not exist yet; afterwards no server may be alive on it."""
    folder = tmp_path / "taskyard"
    yield folder
    left = server_processes(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "a test left PostgreSQL running"


def server_processes(data_dir: Path) -> list[int]:
    """The pids of all PostgreSQL processes on a data folder; each works in its cluster."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").samefile(data_dir / "postgres/data"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "postgres/data/postmaster.pid").read_text().splitlines()[0])


def query(url: str, statement: str) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return str(row[0])


def write(url: str, word: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS words (word text)")
        connection.execute("INSERT INTO words VALUES (%s)", [word])


def wait_until_dead(data_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while server_processes(data_dir):
        assert time.monotonic() < deadline, "processes of the killed server do not end"
        time.sleep(0.01)


@contextmanager
def child(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that uses the server until its standard input ends, and the URL that it got."""
    command = [sys.executable, "-c", CHILD, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "taskyard-test", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(file: Path) -> None:
    """Write until the disk of the file refuses one more page."""
    block = bytes(os.sysconf("SC_PAGE_SIZE"))
    with file.open("wb", buffering=0) as ballast:
        while True:
            ballast.write(block)


async def test_first_start_creates_a_private_durable_server(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the-secret-key")
    for name, value in {"PGPORT": "1", "PGHOST": "nowhere.invalid", "PGDATA": "/nonexistent"}.items():
        monkeypatch.setenv(name, value)
    server = EmbeddedPostgres(data_dir)
    url = await server.start()
    assert url.startswith("postgresql:///taskyard?")
    assert query(url, "SELECT current_database()") == "taskyard"
    settings = ("fsync", "synchronous_commit", "full_page_writes", "data_checksums")
    assert [query(url, f"SHOW {name}") for name in settings] == ["on"] * 4
    assert query(url, "SHOW listen_addresses") == ""
    assert query(url, "SELECT datlocale FROM pg_database LIMIT 1") == "C.UTF-8"
    assert b"the-secret-key" not in Path(f"/proc/{postmaster(data_dir)}/environ").read_bytes()
    await server.stop()
    assert not server_processes(data_dir)


async def test_restart_keeps_the_data(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    write(await server.start(), "kept")
    await server.stop()
    await server.stop()  # idempotent
    url = await server.start()
    assert query(url, "SELECT word FROM words") == "kept"
    await server.stop()


async def test_server_of_a_killed_process_is_adopted(data_dir: Path) -> None:
    with child(data_dir) as (process, url):
        write(url, "kept")
        started = query(url, "SELECT pg_postmaster_start_time()")
        process.kill()
    assert server_processes(data_dir), "the server was to outlive its starter"
    server = EmbeddedPostgres(data_dir)
    assert await server.start() == url
    assert query(url, "SELECT pg_postmaster_start_time()") == started
    assert query(url, "SELECT word FROM words") == "kept"
    await server.stop()
    assert not server_processes(data_dir)


async def test_killed_server_recovers(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    write(await server.start(), "kept")
    os.kill(postmaster(data_dir), signal.SIGKILL)
    again = EmbeddedPostgres(data_dir)
    url = await again.start()
    assert query(url, "SELECT word FROM words") == "kept"
    assert "not properly shut down" in (data_dir / "postgres/log").read_text()
    await server.stop()
    assert query(url, "SELECT 1") == "1", "the dead server's user stopped the new one"
    await again.stop()


async def test_a_kept_server_comes_back(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    url = await server.start()
    keeper = asyncio.create_task(server.keep())
    for word in ("one", "two"):  # it is kept on
        await asyncio.to_thread(write, url, word)
        before = postmaster(data_dir)
        os.kill(before, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while running_url(data_dir) is None or postmaster(data_dir) == before:
            assert time.monotonic() < deadline, "the killed server does not come back"
            await asyncio.sleep(0.02)
    assert query(url, "SELECT count(*) FROM words") == "2"
    keeper.cancel()
    await asyncio.wait({keeper})
    await server.stop()
    assert server_processes(data_dir) == []


async def test_the_end_of_keeping_while_the_server_starts(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    await server.start()
    keeper = asyncio.create_task(server.keep())
    os.kill(postmaster(data_dir), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (
        b"starting PostgreSQL"
        not in (data_dir / "postgres/log").read_bytes().split(b"unexpected postmaster exit")[-1]
    ):
        assert time.monotonic() < deadline, "the killed server is not started"
        await asyncio.sleep(0.01)
    keeper.cancel()
    await asyncio.wait({keeper})
    await server.stop()
    assert server_processes(data_dir) == []


async def test_pid_of_a_dead_server_in_use_by_another_process(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    await server.start()
    os.kill(postmaster(data_dir), signal.SIGKILL)
    wait_until_dead(data_dir)
    pid_file = data_dir / "postgres/data/postmaster.pid"
    # Elsewhere when the path of the data folder is too long for a socket.
    socket_lock = socket_folder(data_dir / "postgres") / ".s.PGSQL.5432.lock"
    # PostgreSQL takes any living process of its own user for its predecessor.
    owner = pid_file.stat().st_uid if os.geteuid() == 0 else None
    stranger = subprocess.Popen(["sleep", "600"], user=owner, stdin=subprocess.DEVNULL)
    try:
        for path in (pid_file, socket_lock):
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
        again = EmbeddedPostgres(data_dir)
        assert query(await again.start(), "SELECT 1") == "1"
        await server.stop()
        await again.stop()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_last_user_stops_the_server(data_dir: Path) -> None:
    first = EmbeddedPostgres(data_dir)
    url = await first.start()
    with child(data_dir) as (process, other):
        assert other == url == running_url(data_dir)
        await first.stop()
        assert query(url, "SELECT 1") == "1"
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert running_url(data_dir) is None
    assert not server_processes(data_dir)


async def test_users_that_start_together_share_one_server(data_dir: Path) -> None:
    users = [EmbeddedPostgres(data_dir) for _ in range(4)]
    urls = await asyncio.gather(*(user.start() for user in users))
    assert len(set(urls)) == 1
    assert (data_dir / "postgres/log").read_text().count("starting PostgreSQL") == 1
    await asyncio.gather(*(user.stop() for user in users))
    assert not server_processes(data_dir)


async def test_cancelled_start_leaves_nothing(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    starting = asyncio.create_task(server.start())
    deadline = time.monotonic() + 60
    while not (data_dir / "postgres/data").exists():
        assert time.monotonic() < deadline, "no cluster"
        await asyncio.sleep(0.001)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not server_processes(data_dir)
    users = FileLock(data_dir / "postgres/users.lock")
    assert users.try_acquire(), "the cancelled start still counts as a user"
    users.release()


async def test_start_cancelled_while_another_process_starts(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    lock = FileLock(data_dir / "postgres/start.lock")
    assert lock.try_acquire()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(EmbeddedPostgres(data_dir).start(), 0.2)
    lock.release()


async def test_silent_server_is_left_alone(data_dir: Path) -> None:
    owner = EmbeddedPostgres(data_dir)
    url = await owner.start()
    os.kill(postmaster(data_dir), signal.SIGSTOP)
    try:
        with pytest.raises(SetupError, match=r"did not get ready in 0\.5 s"):
            await EmbeddedPostgres(data_dir, start_wait_s=0.5).start()
    finally:
        os.kill(postmaster(data_dir), signal.SIGCONT)
    assert query(url, "SELECT 1") == "1"
    await owner.stop()


async def test_server_that_ends_at_start_is_reported_at_once_with_its_log(data_dir: Path) -> None:
    broken = EmbeddedPostgres(data_dir, settings={"shared_buffers": "plenty"})
    with pytest.raises(SetupError, match=r"ended while it started[^$]*\"shared_buffers\": \"plenty\""):
        await broken.start()
    working = EmbeddedPostgres(data_dir)
    await working.start()
    await working.stop()


async def test_interrupted_creation_is_done_again(data_dir: Path) -> None:
    half = data_dir / "postgres/data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    server = EmbeddedPostgres(data_dir)
    assert query(await server.start(), "SELECT 1") == "1"
    await server.stop()
    assert not half.exists()


async def test_long_log_is_put_aside(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = EmbeddedPostgres(data_dir)
    await server.start()
    await server.stop()
    first = (data_dir / "postgres/log").read_text()
    monkeypatch.setattr(embedded_server, "LOG_LIMIT", len(first) - 1)
    await server.start()
    await server.stop()
    assert (data_dir / "postgres/log.1").read_text() == first
    assert first not in (data_dir / "postgres/log").read_text()


async def test_folders_stay_private(tmp_path: Path, data_dir: Path) -> None:
    tmp_path.chmod(0o700)
    parents = {parent: parent.stat().st_mode for parent in data_dir.parents}
    server = EmbeddedPostgres(data_dir)
    await server.start()
    for name in (".", "postgres", "postgres/data", "postgres/run"):
        assert stat.S_IMODE((data_dir / name).stat().st_mode) == 0o700, name
    for name in ("log", "users.lock", "run/.s.PGSQL.5432"):
        assert stat.S_IMODE((data_dir / "postgres" / name).stat().st_mode) & 0o077 == 0, name
    assert {parent: parent.stat().st_mode for parent in data_dir.parents} == parents
    await server.stop()


async def test_path_too_long_for_a_socket(tmp_path: Path) -> None:
    data_dir = tmp_path / ("x" * 100) / "odd & long"
    server = EmbeddedPostgres(data_dir)
    url = await server.start()
    short = Path((data_dir / "postgres/socket-folder").read_text())
    assert stat.S_IMODE(short.stat().st_mode) == 0o700
    assert query(url, "SELECT 1") == "1"
    assert running_url(data_dir) == url
    other = EmbeddedPostgres(data_dir)
    assert await other.start() == url
    await other.stop()
    await server.stop()
    assert not short.exists()
    assert not server_processes(data_dir)


async def test_cluster_of_another_version(data_dir: Path) -> None:
    (data_dir / "postgres/data").mkdir(parents=True)
    (data_dir / "postgres/data/PG_VERSION").write_text("17\n")
    with pytest.raises(SetupError, match="made by PostgreSQL 17, this Taskyard brings 18"):
        await EmbeddedPostgres(data_dir).start()


async def test_data_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for data_dir in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(SetupError, match=r"/file is a file\. Remove it or give another --data-dir"):
            await EmbeddedPostgres(data_dir).start()


async def test_data_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        read_only = pytest.raises(SetupError, match=r"cannot use the data folder .*: Read-only file system")
        with small_disk(tmp_path / "disk", "ro"), read_only:
            await EmbeddedPostgres(tmp_path / "disk").start()
    else:
        (tmp_path / "disk").mkdir(mode=0o500)
        with pytest.raises(SetupError, match=r"cannot use the data folder .*: Permission denied"):
            await EmbeddedPostgres(tmp_path / "disk").start()


@root_only
async def test_disk_full_at_creation(tmp_path: Path) -> None:
    full = pytest.raises(SetupError, match=r"no space is left for .*/disk/postgres")
    with small_disk(tmp_path / "disk", "size=10m"), full:
        await EmbeddedPostgres(tmp_path / "disk").start()


@root_only
async def test_disk_full_at_a_later_start(tmp_path: Path) -> None:
    data_dir = tmp_path / "disk"
    with small_disk(data_dir, "size=150m"):
        server = EmbeddedPostgres(data_dir)
        write(await server.start(), "kept")
        await server.stop()
        ballast = data_dir / "ballast"
        with pytest.raises(OSError, match="No space left"):
            fill(ballast)
        with pytest.raises(SetupError, match=r"no space is left for .*/disk/postgres"):
            await server.start()
        ballast.unlink()
        assert query(await server.start(), "SELECT word FROM words") == "kept"
        await server.stop()


@root_only
async def test_data_of_another_uid_is_taken_over(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    write(await server.start(), "kept")
    await server.stop()
    data = data_dir / "postgres/data"
    owner = data.stat().st_uid
    for path in (data, *data.rglob("*")):
        os.chown(path, 65_534, 65_534, follow_symlinks=False)
    assert query(await server.start(), "SELECT word FROM words") == "kept"
    await server.stop()
    assert data.stat().st_uid == owner


@root_only
def test_ordinary_user(tmp_path: Path) -> None:
    """Tests that run as root would otherwise never see the direct way, without staging."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 65_534, 65_534)
    packages, sources = Path(psycopg.__file__).parents[1], Path(taskyard.__file__).parents[1]
    argv = [
        "env", "-i", f"PATH={os.defpath}", f"LD_LIBRARY_PATH={staged(0)}/lib", "PYTHONDONTWRITEBYTECODE=1",
        f"PYTHONPATH={staged(1)}:{staged(2)}",
        f"{staged(0)}/bin/python3.{sys.version_info.minor}", "-c", CHILD, f"{staged(3)}/taskyard",
    ]  # fmt: skip
    paths = [Path(sys.base_prefix), packages, sources, home]
    done = subprocess.run(
        confined(Identity(65_534, 65_534), paths, argv),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd="/", timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"host={staged(3)}/taskyard/postgres/run" in done.stdout
    assert (home / "taskyard/postgres/data").stat().st_uid == 65_534
    assert not server_processes(home / "taskyard")


def test_second_server_on_a_data_folder_is_refused(data_dir: Path) -> None:
    text = (
        rf"another Taskyard server \(pid {os.getpid()}\) already uses {data_dir}; stop it or give --data-dir"
    )
    with ServeLock(data_dir), pytest.raises(SetupError, match=text):
        ServeLock(data_dir).__enter__()
    with ServeLock(data_dir):
        assert (data_dir / "serve.lock").read_text() == f"{os.getpid()}\n"


def test_running_url_without_a_server(data_dir: Path) -> None:
    assert running_url(data_dir) is None
    assert not data_dir.exists()
