"""Fill a database with tasks like those of a large team, for bench/million.py."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg

WORDS = 6000
ORIGINS = {
    "user_created": 70,
    "automation": 12,
    "slack": 10,
    "signal_report": 6,
    "error_tracking": 1.99,
    "hogdesk": 0.01,
}
STATUSES = {"completed": 78, "failed": 12, "cancelled": 9.97, "in_progress": 0.02, "queued": 0.01}
STAGES = {None: 60, "build": 25, "review": 10, "plan": 4.99, "deploy": 0.01}
STARTED = datetime(2024, 1, 1, tzinfo=UTC)


class Vocabulary:
    """Made-up words, the n-th as frequent as 1/n: as in prose, a few are everywhere and most are rare."""

    def __init__(self, random: random.Random) -> None:
        syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "er", "in", "on")]
        made = {"".join(random.choices(syllables, k=random.choice((1, 2, 2, 3)))) for _ in range(WORDS * 2)}
        self.words = sorted(made)
        random.shuffle(self.words)
        self.words = self.words[:WORDS]
        weights = [1 / (n + 1) for n in range(len(self.words))]
        self._sum = [0.0]
        for weight in weights:
            self._sum.append(self._sum[-1] + weight)
        self._random = random

    def text(self, count: int) -> str:
        return " ".join(self._random.choices(self.words, cum_weights=self._sum[1:], k=count))


def tasks(
    project: int, users: list[int], count: int, seed: int
) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...] | None]]:
    """Rows of tasks, each with the row of its run, if it has one, in the order of the COPYs below."""
    r = random.Random(seed)
    vocabulary = Vocabulary(random.Random(1))
    repositories = [f"org{n % 12}/repo{n}" for n in range(200)]
    own = {user: r.sample(repositories, 10) for user in users}
    user_weights = [1 / (n + 1) for n in range(len(users))]
    creators = r.choices(users, user_weights, k=count)
    origins = r.choices(list(ORIGINS), list(ORIGINS.values()), k=count)
    statuses = r.choices(list(STATUSES), list(STATUSES.values()), k=count)
    stages = r.choices(list(STAGES), list(STAGES.values()), k=count)
    for number in range(count):
        at = STARTED + timedelta(seconds=number * 60)
        task_id, run_id = (
            uuid.UUID(int=r.getrandbits(128), version=4),
            uuid.UUID(int=r.getrandbits(128), version=4),
        )
        has_run = r.random() > 0.05
        run_at = at + timedelta(seconds=2)
        words = min(int(math.exp(r.gauss(3.5, 0.8))) + 3, 1500)
        task = (
            task_id, project, number, vocabulary.text(6)[:255], vocabulary.text(words), origins[number],
            r.choice(own[creators[number]]), r.random() < 0.02, r.random() < 0.05, creators[number],
            at, at, at if r.random() < 0.01 else None,
            run_id if has_run else None, run_at if has_run else None, statuses[number] if has_run else None,
        )  # fmt: skip
        run = (run_id, task_id, project, statuses[number], "cloud", stages[number], run_at, run_at)
        yield task, run if has_run else None


def fill(url: str, counts: Mapping[int, int], users: list[int]) -> None:
    """Put tasks, most with a run, into empty projects. What triggers keep is filled at the end."""
    with psycopg.connect(url) as connection:
        execute = connection.execute
        execute("SET maintenance_work_mem = '512MB'")
        execute("ALTER TABLE tasks DISABLE TRIGGER USER")
        execute("ALTER TABLE runs DISABLE TRIGGER USER")
        definition = execute("SELECT pg_get_indexdef('task_search_lexemes'::regclass)").fetchone()
        assert definition is not None
        execute("DROP INDEX task_search_lexemes")
        for project, count in counts.items():
            runs = []
            with connection.cursor().copy(COPY_TASKS) as copy:
                for task, run in tasks(project, users, count, seed=project):
                    copy.write_row(task)
                    if run is not None:
                        runs.append(run)
            with connection.cursor().copy(COPY_RUNS) as copy:
                for run in runs:
                    copy.write_row(run)
            execute("UPDATE projects SET next_task_number = %s WHERE id = %s", [count, project])
        for statement in KEPT_BY_TRIGGERS:
            execute(statement)
        execute(definition[0].encode())
        execute("ALTER TABLE tasks ENABLE TRIGGER USER")
        execute("ALTER TABLE runs ENABLE TRIGGER USER")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


COPY_TASKS = """COPY tasks (id, project_id, task_number, title, description, origin_product, repository, internal,
    archived, created_by_id, created_at, updated_at, deleted_at, latest_run_id, latest_run_at, latest_status)
    FROM STDIN"""
COPY_RUNS = (
    """COPY runs (id, task_id, project_id, status, environment, stage, created_at, updated_at) FROM STDIN"""
)
KEPT_BY_TRIGGERS: tuple[LiteralString, ...] = (
    """INSERT INTO task_search SELECT project_id, task_number,
        search_text(title) || chr(1) || search_text(description)
        FROM tasks WHERE deleted_at IS NULL ORDER BY project_id, task_number""",
    """INSERT INTO task_count_changes SELECT project_id, internal, archived, created_by_id, origin_product,
        coalesce(latest_status, ''), count(*), repository
        FROM tasks WHERE deleted_at IS NULL GROUP BY 1, 2, 3, 4, 5, 6, 8""",
    "SELECT fold_task_counts()",
)
