"""What a storm does to a site. Each fault says what it hit, or None when there was nothing to hit.

The clock is stepped as the leases see it, which are measured by the database's clock alone: all that is due in the next
hour is due now. The clock of the machine itself is left alone, it is everybody's.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import psycopg

from tests.faults.site import Part, Site

STOPPED_S = 40.0
FULL_S = 4.0

Fault = Callable[[Site, Random], Awaitable[str | None]]
_background: set[asyncio.Task[None]] = set()


async def kill_api(site: Site, _: Random) -> str | None:
    return _signal(site.api, signal.SIGKILL)


async def kill_worker(site: Site, random: Random) -> str | None:
    return _signal(random.choice(site.workers), signal.SIGKILL)


async def restart_worker(site: Site, random: Random) -> str | None:
    """As a deploy does."""
    return _signal(random.choice(site.workers), signal.SIGTERM)


async def stop_worker(site: Site, random: Random) -> str | None:
    """A worker that does nothing for longer than its leases hold, and then goes on as if nothing had been."""
    part = random.choice(site.workers)
    said = _signal(part, signal.SIGSTOP)
    if said is not None:
        process = part.process
        assert process is not None
        _later(STOPPED_S, lambda: _signal_process(process.pid, signal.SIGCONT))
    return said


async def kill_agent(site: Site, random: Random) -> str | None:
    return _kill_one(random, [pid for pid in site.in_sandboxes() if "stepping_agent" in _command(pid)][-1:])


async def kill_in_sandbox(site: Site, random: Random) -> str | None:
    """Whatever it is: bwrap, git, the agent, the door."""
    return _kill_one(random, site.in_sandboxes())


async def kill_postgres(site: Site, _: Random) -> str | None:
    return _kill_one(Random(0), site.postgres.pids())


async def kill_connection(site: Site, random: Random) -> str | None:
    """One process of PostgreSQL, which then ends all the others and recovers."""
    pids = await _ask(site, "SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
    return _kill_one(random, pids)


async def cut_connections(site: Site, _: Random) -> str | None:
    query = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid()"
    )
    counts = await _ask(site, query)
    return f"{counts[0]} connections" if counts else None


async def step_clock(site: Site, _: Random) -> str | None:
    query = (
        "WITH stepped AS (UPDATE run_cursors SET leased_until = leased_until - interval '1 hour'"
        " WHERE leased_until IS NOT NULL RETURNING 1) SELECT count(*) FROM stepped"
    )
    counts = await _ask(site, query)
    return f"{counts[0]} leases" if counts else None


async def fill_disk(site: Site, _: Random) -> str | None:
    if not site.disk:
        return None
    path = site.data_dirs[0] / "ballast"
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            found = os.fstatvfs(descriptor)
            os.posix_fallocate(descriptor, 0, found.f_bavail * found.f_frsize)
        finally:
            os.close(descriptor)
    await asyncio.sleep(FULL_S)
    path.unlink(missing_ok=True)
    return f"{FULL_S:g} s"


FAULTS: dict[str, tuple[Fault, int]] = {
    "kill worker": (kill_worker, 5),
    "kill agent": (kill_agent, 5),
    "kill in sandbox": (kill_in_sandbox, 5),
    "kill api": (kill_api, 3),
    "kill postgres": (kill_postgres, 2),
    "kill connection": (kill_connection, 2),
    "cut connections": (cut_connections, 3),
    "restart worker": (restart_worker, 2),
    "stop worker": (stop_worker, 1),
    "step clock": (step_clock, 1),
    "fill disk": (fill_disk, 1),
}
"""By name, with how often each comes."""


async def calm() -> None:
    """Wait until what was stopped goes on."""
    await asyncio.gather(*_background)


def _later(delay_s: float, work: Callable[[], object]) -> None:
    async def later() -> None:
        await asyncio.sleep(delay_s)
        work()

    task = asyncio.create_task(later())
    _background.add(task)
    task.add_done_callback(_background.discard)


def _signal(part: Part, number: int) -> str | None:
    process = part.process
    if process is None or process.poll() is not None:
        return None
    process.send_signal(number)
    return f"{part.name} (process {process.pid})"


def _signal_process(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_one(random: Random, pids: list[int]) -> str | None:
    if not pids:
        return None
    pid = random.choice(pids)
    command = _command(pid)
    _signal_process(pid, signal.SIGKILL)
    return f"process {pid}: {command[:60]}"


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return ""


async def _ask(site: Site, query: str) -> list[int]:
    try:
        async with await psycopg.AsyncConnection.connect(
            site.postgres.url, autocommit=True, connect_timeout=2
        ) as connection:
            rows = await (await connection.execute(query.encode())).fetchall()
    except psycopg.Error:  # away, by an earlier fault
        return []
    return [row[0] for row in rows]
