"""Lists and searches among a million tasks: `python -m bench.million`.

Fills a database (10 minutes or so; with `--data-dir` only once), asks for each list many times over HTTP, and prints
p50 and p95. `--plans DIR` saves what PostgreSQL says about each statement (EXPLAIN (ANALYZE, BUFFERS)).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode
from uuid import uuid4

import httpx
import psycopg
from psycopg.rows import tuple_row

from bench.fill import Vocabulary, fill
from bench.server import Server, running_server
from taskyard.accounts.caller import Caller, Project
from taskyard.db.embedded import running_url
from taskyard.db.engine import Database
from taskyard.tasks import service
from taskyard.tasks.schemas import TaskQuery

USERS = 50
Query = dict[str, Any]


def cases(users: list[int]) -> dict[str, list[Query]]:
    """Lists by name. The queries of one take turns."""
    words = Vocabulary(random.Random(1)).words

    def search(*terms: str) -> list[Query]:
        return [{"search": term} for term in terms]

    return {
        "all": [{}],
        "100 at once": [{"limit": 100}],
        "created_by, large": [{"created_by": user} for user in users[:3]],
        "created_by, small": [{"created_by": user} for user in users[-20:]],
        "origin_product, common": [{"origin_product": "user_created"}],
        "origin_product, rare": [{"origin_product": "hogdesk"}],
        "origin_product, none": [{"origin_product": "nowhere"}],
        "organization": [{"organization": f"org{n}"} for n in range(12)],
        "repository, whole": [{"repository": f"org{n % 12}/repo{n}"} for n in range(0, 200, 9)],
        "repository, name": [{"repository": f"repo{n}"} for n in range(0, 200, 9)],
        "status, common": [{"status": "completed"}],
        "status, rare": [{"status": "queued"}, {"status": "in_progress"}],
        "status, none": [{"status": "not_started"}],
        "internal": [{"internal": "true"}],
        "archived": [{"archived": "true"}],
        "internal and archived: all": [{"internal": "all", "archived": "all"}],
        "stage, rare": [{"stage": "deploy"}],
        "stage, common": [{"stage": "build"}],
        "created_by + status": [{"created_by": user, "status": "failed"} for user in users[:20]],
        "created_by + repository": [{"created_by": users[0], "repository": f"repo{n}"} for n in range(20)],
        "search, in most tasks": search(*words[:8]),
        "search, in 1 of 10": search(*words[40:60]),
        "search, in 1 of 100": search(*words[500:540]),
        "search, in 1 of 1000": search(*words[4000:4040]),
        "search, two rare words": search(*(f"{a} {b}" for a, b in zip(words[900:940], words[940:980], strict=True))),
        "search, none": search(*(f"qx{n}zq" for n in range(100, 140))),
        "search, 1 character": search(*"aeiou"),
        "search, 2 characters": search("ba", "ki", "on", "er"),
        "search, 2 characters, none": search("qx", "zq", "#1"),
        "search, 3 characters": search("bak", "kim", "ron", "ter"),
        "search, number": search(*(f"BIG-{n}" for n in range(1000, 800_000, 31_000))),
        "search + created_by": [{"search": word, "created_by": users[-1]} for word in words[500:520]],
        "search + status": [{"search": word, "status": "failed"} for word in words[500:520]],
        "search, phrase of words in most": search(*(f"{a} {b}" for a, b in zip(words[:4], words[4:8], strict=True))),
        "offset 10,000": [{"offset": 10_000 + n} for n in range(50)],
        "offset 100,000": [{"offset": 100_000 + n} for n in range(50)],
        "offset 450,000": [{"offset": 450_000 + n} for n in range(50)],
    }  # fmt: skip


def prepare(server: Server, count: int) -> list[int]:
    """Fill an empty site, nine tenths of it in the first project; the users that created tasks."""
    url = running_url(server.data_dir)
    assert url is not None
    with psycopg.connect(url, autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM tasks LIMIT 1").fetchone() is None:
            for n in range(USERS):
                connection.execute("INSERT INTO users (email) VALUES (%s)", [f"user{n}@example.org"])
            connection.execute(
                "INSERT INTO projects (organization_id, name) SELECT id, 'Other' FROM organizations LIMIT 1"
            )
        users = [row[0] for row in connection.execute("SELECT id FROM users ORDER BY id").fetchall()]
        projects = [row[0] for row in connection.execute("SELECT id FROM projects ORDER BY id").fetchall()]
        filled = connection.execute("SELECT 1 FROM tasks LIMIT 1").fetchone()
    if filled is None:
        started = time.monotonic()
        fill(url, {projects[0]: count * 9 // 10, projects[1]: count // 10}, users[-USERS:])
        print(f"{count:,} tasks written in {time.monotonic() - started:.0f} s")
    return users[-USERS:]


async def measure(server: Server, users: list[int], repeat: int) -> None:
    async with httpx.AsyncClient(
        base_url=f"{server.url}/api/projects/@current/tasks/",
        headers={"Authorization": f"Bearer {server.key}"},
        timeout=60,
        trust_env=False,
    ) as client:
        print(f"{'list':<34} {'count':>8} {'CPU ms':>8} {'PG ms':>8} {'p50 ms':>8} {'p95 ms':>8}")
        for name, queries in cases(users).items():
            times: list[float] = []
            found: Any = None
            before = server.cpu()
            for n in range(-len(queries), repeat):
                if n == 0:
                    before = server.cpu()
                started = time.perf_counter()
                response = await client.get(f"?{urlencode(queries[n % len(queries)])}")
                elapsed = time.perf_counter() - started
                response.raise_for_status()
                found = response.json()
                if n >= 0:
                    times.append(elapsed * 1000)
            after = server.cpu()
            cpu = {part: (after[part] - before[part]) * 1000 / repeat for part in after}
            times.sort()
            print(
                f"{name:<34} {found['count']:>8} {cpu['server']:8.1f} {cpu['postgres']:8.1f}"
                f" {statistics.median(times):8.1f} {times[int(len(times) * 0.95)]:8.1f}",
                flush=True,
            )


class ExplainingCursor(psycopg.AsyncCursor[Any]):
    """Asks for the plan of each statement before it executes it."""

    plans: ClassVar[list[str]] = []

    async def execute(self, query: Any, params: Any = None, **options: Any) -> ExplainingCursor:
        plain: psycopg.AsyncCursor[Any] = psycopg.AsyncCursor(self.connection, row_factory=tuple_row)
        await plain.execute("EXPLAIN (ANALYZE, BUFFERS) " + query, params, prepare=False)
        self.plans.append("\n".join([query.strip(), *("    " + row[0] for row in await plain.fetchall())]))
        await super().execute(query, params, **options)
        return self


async def explain(server: Server, users: list[int], folder: Path) -> None:
    """One file for each list: its statements with their plans."""
    url = running_url(server.data_dir)
    assert url is not None
    folder.mkdir(parents=True, exist_ok=True)
    database = Database(url, max_connections=1)
    await database.open()
    async with database.connection() as connection:
        row = await (await connection.execute("SELECT * FROM projects ORDER BY id LIMIT 1")).fetchone()
        assert row is not None
        project = Project(row["id"], row["name"], row["organization_id"])
        caller = Caller(users[0], "", False, frozenset("*"), uuid4(), project)
        connection.cursor_factory = ExplainingCursor
        for name, queries in cases(users).items():
            query = dict(queries[0])
            limit, offset = query.pop("limit", 50), query.pop("offset", 0)
            ExplainingCursor.plans.clear()
            await service.page(
                connection, caller, TaskQuery.model_validate(query), limit, offset, count_limit=1000
            )
            text = f"{name}: {queries[0]}\n\n" + "\n\n".join(ExplainingCursor.plans) + "\n"
            file = "".join(char if char.isalnum() else "-" for char in name)
            (folder / f"{file}.txt").write_text(text, "utf-8")
    await database.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.million", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=100, help="requests for each list")
    parser.add_argument("--data-dir", type=Path, help="keep the database here, and use it if it is there")
    parser.add_argument("--plans", type=Path, help="folder for the plans")
    args = parser.parse_args()
    with running_server(args.data_dir) as server:
        users = prepare(server, args.tasks)
        asyncio.run(measure(server, users, args.repeat))
        if args.plans:
            asyncio.run(explain(server, users, args.plans))
    return 0


if __name__ == "__main__":
    sys.exit(main())
