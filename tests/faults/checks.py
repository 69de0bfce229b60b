"""What has to be true after a storm. Each check returns what is wrong, in sentences."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg

from taskyard.sandbox import cgroups, identities
from tests.faults.site import Site
from tests.faults.talks import Talk
from tests.support.repositories import heads, run_git

GOT = re.compile(r"^GOT (\S+) PID (\d+)$", re.MULTILINE)


def run_is_right(it: Talk, repository: Path) -> Iterator[str]:
    """The run ended as it should, nothing of it is missing, and nothing is there twice."""
    who = f"run {it.number} ({it.run})"
    if it.body["status"] != "completed" or it.body["error_message"]:
        yield f"{who} is {it.body['status']}: {it.body['error_message']} {it.body['state'].get('error_type')}"
        return
    branch = (it.body.get("output") or {}).get("head_branch")
    if branch is None or branch not in heads(repository):
        yield f"{who} has no branch: {it.body.get('output')}"
    else:
        files = run_git(repository, "ls-tree", "-r", "--name-only", branch).splitlines()
        for name in it.messages:
            path, wanted = f"work/{name}.txt", [str(number + 1) for number in range(it.steps[name])]
            found = run_git(repository, "show", f"{branch}:{path}").split() if path in files else []
            if found != wanted:
                yield f"{who}: {path} has the steps {found}, not {wanted}"
    yield from messages_arrived(it, who)
    if it.seen != it.replay:
        first = next((pair for pair in zip(it.seen, it.replay, strict=False) if pair[0] != pair[1]), None)
        yield f"{who}: a live reader saw {len(it.seen)} events, a replay has {len(it.replay)}; first other: {first}"
    if any("REPLAYED" in line for line in it.log):
        yield f"{who}: what an agent repeated of an earlier session is in the log"


def messages_arrived(it: Talk, who: str) -> Iterator[str]:
    """Each accepted message reached the agent, in order, and once only in each life of it."""
    told = [_prompt(line) for line in it.log if '"user_message_chunk"' in line]
    told = [name for name in told if name]
    if told != it.messages:
        yield f"{who}: the record has the messages {told}, accepted were {it.messages}"
    lives: list[list[str]] = [[]]
    for line in it.log:
        if '"_posthog/run_started"' in line:
            lives.append([])
        lives[-1] += [found[1] for found in GOT.finditer(_said(line))]
    for life in lives:
        if len(life) != len(set(life)):
            yield f"{who}: an agent got a message twice in one life: {lives}"
    order = list(dict.fromkeys(name for life in lives for name in life))
    if order != it.messages:
        yield f"{who}: the agent got {lives}, accepted were {it.messages}"
    done = "".join(line for line in it.log if '"_posthog/turn_complete"' in line).count("turn_complete")
    if done != len(it.messages):
        yield f"{who}: {done} turns ended, for {len(it.messages)} messages"


def _said(line: str) -> str:
    try:
        update = json.loads(line)["notification"]["params"]["update"]
        return str(update["content"]["text"]) if update["sessionUpdate"] == "agent_message" else ""
    except (KeyError, TypeError):
        return ""


def _prompt(line: str) -> str:
    found = re.search(r"MSG (\S+) STEPS", line)
    return found[1] if found else ""


async def record_is_right(site: Site, talks: list[Talk]) -> list[str]:
    """Numbers without gap or double; stream and log are the record, byte for byte; the database holds nothing more."""
    wrong = []
    async with await psycopg.AsyncConnection.connect(site.postgres.url, autocommit=True) as connection:
        for it in talks:
            rows = await (
                await connection.execute(
                    "SELECT seq, at_ms, shown, data FROM events WHERE run_id = %s ORDER BY seq", [it.run]
                )
            ).fetchall()
            last = await (
                await connection.execute("SELECT last_seq FROM run_cursors WHERE run_id = %s", [it.run])
            ).fetchone()
            numbers = [row[0] for row in rows]
            if last is None or numbers != list(range(1, last[0] + 1)):
                wrong.append(f"run {it.number}: the events are not numbered 1 to {last}: {numbers}")
            if it.log != [row[3] for row in rows if row[2] & 1]:
                wrong.append(f"run {it.number}: the log is not what was recorded")
            if it.replay != [(f"{row[1]}-{row[0]}", row[3]) for row in rows if row[2] & 2]:
                wrong.append(f"run {it.number}: the stream is not what was recorded")
        for query, what in (
            (
                "SELECT run_id::text FROM run_cursors WHERE leased_until IS NOT NULL OR worker IS NOT NULL",
                "leases",
            ),
            ("SELECT id::text FROM runs WHERE started_at IS NOT NULL", "runs that should be driven"),
            ("SELECT run_id::text FROM run_queue", "runs in the queue"),
            ("SELECT id::text FROM procrastinate_jobs WHERE status = 'doing'", "jobs"),
            (
                "SELECT run_id::text || seq FROM commands WHERE answered_at IS NULL",
                "commands without an answer",
            ),
        ):
            rows = await (await connection.execute(query.encode())).fetchall()
            if rows:
                wrong.append(f"left in the database: {what} {[row[0] for row in rows]}")
    return wrong


def left_on_host(site: Site, talks: list[Talk]) -> list[str]:
    """Processes, folders, mounts, control groups, uids that are still there. Workers may be running."""
    runs = {it.run for it in talks}
    # Other servers of this host have groups, too.
    wrong = [f"control group {name}" for name in groups() if name[:36] in runs]
    if pids := site.in_sandboxes():
        wrong.append(f"processes in sandboxes: {pids}")
    own = {part.process.pid for part in (site.api, *site.workers) if part.process}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        ours = str(site.data_dirs[0]) in words or str(site.data_dirs[1]) in words or "stepping_agent" in words
        if ours and int(folder.name) not in own | {os.getpid()}:
            wrong.append(f"process {folder.name}: {words[:200]!r}")
    for data_dir in site.data_dirs:
        git = "mirrors/*.git"
        for pattern in ("sandboxes/*", "mirrors/*.new", f"{git}/*.lock", f"{git}/refs/**/*.lock", "*.part"):
            wrong += [f"left: {path}" for path in data_dir.glob(pattern)]
        if str(data_dir) in Path("/proc/self/mountinfo").read_text().replace(f" {data_dir} ", " "):
            wrong.append(f"something of {data_dir} is mounted")
    if os.geteuid() == 0:
        wrong += [f"uid of {path}" for path in identities.folders() if path.parent in site.roots]
    return wrong


def groups() -> set[str]:
    """Control groups of sandboxes on this host."""
    try:
        return cgroups.find().names()
    except cgroups.UnavailableError:
        return set()
