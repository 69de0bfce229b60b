"""The storm: runs are made, talked to and worked on while fault after fault hits the site. Then all is looked through.

A seed decides which faults come, in which order and how long after each other, and what the runs do. What a fault hits
depends on what there is at that moment, so a storm is repeated as to its weather, not to the last instruction.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx

from tests.faults import checks
from tests.faults.faults import FAULTS, calm
from tests.faults.site import Site
from tests.faults.talks import Client, Talk, talk
from tests.support.repositories import make_bare, make_repository

READY_S = 120.0
CLEAN_S = 90.0
DEAF_S = 15.0
"""/health may be slow while everything starts at once, on a small machine."""
ENDING_S = 3.0
"""From the first closed socket of a killed server to its end."""


@dataclass
class Report:
    """What a storm was, and what is wrong after it."""

    seed: int
    hits: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    messages: int = 0
    health: int = 0
    """How often /health was asked while the API was there."""
    took_s: float = 0
    wrong: list[str] = field(default_factory=list)

    def text(self) -> str:
        hits = ", ".join(f"{name} {count}" for name, count in sorted(self.hits.items()))
        head = (
            f"seed {self.seed}: {sum(self.hits.values())} faults ({hits}); {self.runs} runs, {self.messages} messages,"
            f" /health asked {self.health} times, {self.took_s:.0f} s"
        )
        return "\n".join([head, *([f"WRONG: {line}" for line in self.wrong] or ["nothing is wrong"])])


async def storm(folder: Path, seed: int, kills: int, *, at_once: int = 5, workers: int = 3) -> Report:
    """Let it loose in an empty folder until `kills` faults have hit; `at_once` runs go on at any time."""
    print(f"storm: seed {seed}, {kills} faults, in {folder}", flush=True)
    report, begun = Report(seed), time.monotonic()
    bare = make_bare(folder / "origin.git", make_repository(folder / "origin"))
    site = Site(folder, workers)
    talks: list[Talk] = []
    try:
        await site.start()
        client = Client(site)
        await _ready(site)
        repository = (await client.call("POST", "repositories/", {"origin": str(bare)})).json()["name"]
        over = asyncio.Event()
        health = asyncio.create_task(_listen(site, over, report))
        people = [
            asyncio.create_task(
                _talk_on(client, repository, number, at_once, Random(f"{seed}:{number}"), over, talks, report)
            )
            for number in range(at_once)
        ]
        await _weather(site, Random(seed), kills, report)
        over.set()
        print("storm: over, waiting for the runs to end", flush=True)
        await calm()
        for person in await asyncio.gather(*people, return_exceptions=True):
            if isinstance(person, BaseException):
                report.wrong.append(f"{type(person).__name__}: {person}")
        await health
        report.runs, report.messages = len(talks), sum(len(it.messages) for it in talks)
        for it in talks:
            (folder / f"run{it.number}.log").write_text("\n".join(it.log))
            report.wrong += checks.run_is_right(it, bare)
        await _clean(site, talks, report)
        report.wrong += await checks.record_is_right(site, talks)
        await client.close()
        await asyncio.gather(*(part.stop() for part in (*site.workers, site.api)))
        report.wrong += [f"after the stop: {line}" for line in checks.left_on_host(site, talks)]
    finally:
        await site.stop()
    report.took_s = time.monotonic() - begun
    return report


async def _ready(site: Site) -> None:
    end = time.monotonic() + READY_S
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while True:
            try:
                if (await client.get(f"{site.url}/ready")).status_code == 200 and site.key:
                    return
            except (httpx.TransportError, OSError):
                pass
            assert time.monotonic() < end, f"the site is not ready after {READY_S:g} s: see {site.folder}"
            await asyncio.sleep(0.1)


async def _weather(site: Site, random: Random, kills: int, report: Report) -> None:
    names = [name for name, (_, often) in FAULTS.items() for _ in range(often)]
    count = 0
    while count < kills:
        await asyncio.sleep(random.uniform(0.3, 4.0))
        name, choice = random.choice(names), Random(random.random())
        hit = await FAULTS[name][0](site, choice)
        if hit is not None:
            count += 1
            report.hits[name] = report.hits.get(name, 0) + 1
            print(f"storm: {count} {name}: {hit}", flush=True)


async def _talk_on(
    client: Client,
    repository: str,
    first: int,
    step: int,
    random: Random,
    over: asyncio.Event,
    talks: list[Talk],
    report: Report,
) -> None:
    """One run after another until the storm is over, one at least."""
    number = first
    while number == first or not over.is_set():
        try:
            talks.append(await talk(client, number, repository, random))
        except AssertionError as error:
            print(f"storm: WRONG: {error}", flush=True)
            report.wrong.append(str(error))
        number += step


async def _listen(site: Site, over: asyncio.Event, report: Report) -> None:
    """/health answers whenever the API is there, whatever became of the rest."""
    # Each time a connection of its own: one that is kept may be closed by the other side just when it is used again.
    headers = {"Connection": "close"}
    async with httpx.AsyncClient(trust_env=False, timeout=DEAF_S, headers=headers) as client:
        ready_start = -1
        while not over.is_set():
            start, process, asked = site.api.starts, site.api.process, time.strftime("%X")
            try:
                answer = await client.get(f"{site.url}/health")
                said = "" if answer.status_code == 200 else f"said {answer.status_code}"
            except httpx.TransportError as error:
                said = f"did not answer ({type(error).__name__}: {error})"
            if not said:
                ready_start = start
                report.health += 1
            elif ready_start == start and process is not None and not await _ends(process):
                report.wrong.append(f"/health {said}, asked at {asked}; the API was there")
            await asyncio.sleep(0.25)


async def _ends(process: subprocess.Popen[bytes]) -> bool:
    """A process that was killed closes its sockets first, and only then is it one that has ended."""
    deadline = time.monotonic() + ENDING_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def _clean(site: Site, talks: list[Talk], report: Report) -> None:
    """Everything that was left is gone after the next sweep."""
    end = time.monotonic() + CLEAN_S
    while left := checks.left_on_host(site, talks):
        if time.monotonic() > end:
            report.wrong += left
            return
        await asyncio.sleep(1)


def lower_priority() -> None:
    """Others work on this machine, too."""
    os.nice(10)
