"""The queue of runs below the API: who is taken next, under which limits, and what is found again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from taskyard.accounts import admin
from taskyard.db.engine import Database
from taskyard.jobs import enqueue_drive
from taskyard.runs import lifecycle, queue, store, workers
from taskyard.runs.queue import Limits
from taskyard.runs.resume import Turn
from taskyard.runs.workers import Worker
from tests.support.yard import Api, Run, Yard, error, ok

NO_LIMITS = Limits()


def worker(name: str = "w", *, pools: tuple[str, ...] = ("default",), **fields: Any) -> Worker:
    values = {"capacity": 8, "sandboxes": ["bubblewrap"], "agents": ["claude", "codex", "scripted"], **fields}
    return Worker(name=name, pools=list(pools), **values)


async def start(yard: Yard, **body: Any) -> Run:
    return await yard.api().start("x", **body)


async def of_other(yard: Yard) -> Run:
    return await yard.api("eve", yard.other_project).start("x")


async def taken(yard: Yard, by: Worker | None = None, limits: Limits = NO_LIMITS) -> str | None:
    found = await queue.take(yard.database, by or worker(), limits)
    return None if found is None else str(found)


async def all_taken(yard: Yard, by: Worker | None = None, limits: Limits = NO_LIMITS) -> list[str]:
    found = []
    while (run := await taken(yard, by, limits)) is not None:
        found.append(run)
    return found


async def done(yard: Yard, run: str, name: str = "w") -> None:
    """The run is driven to its end, and its slot freed."""
    claimed = await store.claim(yard.database, UUID(run), name)
    assert claimed is not None
    async with yard.database.transaction() as connection:
        await lifecycle.change(connection, UUID(run), status="completed")
    await store.release(yard.database, claimed.lease)
    await queue.give_back(yard.database, UUID(run), name)


async def shown(run: Run) -> Any:
    return (await run.fetch())["state"].get("queue")


class TestOrder:
    async def test_oldest_first(self, yard: Yard) -> None:
        runs = [(await start(yard)).id for _ in range(4)]
        assert await all_taken(yard) == runs

    async def test_priority_then_age(self, yard: Yard) -> None:
        late, first, second, urgent = [
            (await start(yard, **({"priority": value} if value else {}))).id for value in (-5, 0, 0, 7)
        ]
        assert await all_taken(yard) == [urgent, first, second, late]

    async def test_what_began_goes_on_first(self, yard: Yard) -> None:
        urgent, begun = await start(yard, priority=9), await start(yard)
        async with yard.database.transaction() as connection:
            await lifecycle.change(connection, UUID(begun.id), status="in_progress")
            await enqueue_drive(connection, UUID(begun.id))
        assert await all_taken(yard) == [begun.id, urgent.id]

    async def test_a_project_with_many_does_not_starve_one_with_one(self, yard: Yard) -> None:
        many = [(await start(yard)).id for _ in range(6)]
        assert await taken(yard) == many[0]
        one = await of_other(yard)
        assert await taken(yard) == one.id

    async def test_projects_take_turns_on_a_single_slot(self, yard: Yard) -> None:
        """With one run at a time nobody has more slots than the others: whose turn is longest ago comes first."""
        mine, theirs = (
            [(await start(yard)).id for _ in range(3)],
            [(await of_other(yard)).id for _ in range(2)],
        )
        order = []
        while (run := await taken(yard)) is not None:
            order.append(run)
            await done(yard, run)
        assert order == [mine[0], theirs[0], mine[1], theirs[1], mine[2]]

    async def test_enqueued_twice_keeps_its_place(self, yard: Yard) -> None:
        first, second = await start(yard), await start(yard)
        async with yard.database.transaction() as connection:
            await enqueue_drive(connection, UUID(first.id))
        assert await all_taken(yard) == [first.id, second.id]


class TestFairness:
    """Three projects with loads of their own: a flood, some, and few."""

    @pytest.fixture
    async def apis(self, yard: Yard) -> list[Api]:
        made = (await admin.create_project(yard.database, "Third"))["id"]
        await admin.add_member(yard.database, "ada@example.org", made)
        return [yard.api(), yard.api("eve", yard.other_project), yard.api("ada", made)]

    async def driven(
        self, yard: Yard, limits: Limits, owner: dict[str, int], more: Callable[[], Awaitable[None]]
    ) -> list[int]:
        """Whose runs were taken, in order, until none waits: as soon as the slots are full, the oldest one ends."""
        order: list[int] = []
        held: list[str] = []
        while True:
            if (run := await taken(yard, limits=limits)) is not None:
                order.append(owner[run])
                held.append(run)
                await more()
            elif held:
                await done(yard, held.pop(0))
            else:
                return order

    @pytest.mark.parametrize("slots", [1, 2, 4])
    async def test_slots_are_shared_whatever_the_loads_and_priorities(
        self, yard: Yard, apis: list[Api], slots: int
    ) -> None:
        owner: dict[str, int] = {}

        async def add(project: int, **body: Any) -> None:
            owner[(await apis[project].start("x", **body)).id] = project

        for _ in range(12):
            await add(0, priority=100)
        for n in range(5):
            await add(1, priority=-n)
        for _ in range(3):
            await add(2, priority=-100)
        order = await self.driven(yard, Limits(total=slots), owner, nothing)
        # As long as all three have something waiting, each three in a row are of all three.
        assert [sorted(order[n : n + 3]) for n in (0, 3, 6)] == [[0, 1, 2]] * 3
        # Then the other two take turns, and in the end the flood has it all.
        assert sorted(order[9:13]) == [0, 0, 1, 1]
        assert order[13:] == [0] * 7

    async def test_a_flood_that_never_ends_holds_up_nobody(self, yard: Yard, apis: list[Api]) -> None:
        owner: dict[str, int] = {}
        left = 20

        async def flood() -> None:
            nonlocal left
            left -= 1
            for _ in range(2 if left > 0 else 0):
                owner[(await apis[0].start("x", priority=100)).id] = 0

        await flood()
        late = [(await apis[1].start("x", priority=-100)).id for _ in range(3)]
        owner |= dict.fromkeys(late, 1)
        order = await self.driven(yard, Limits(total=1), owner, flood)
        assert [n for n, project in enumerate(order) if project == 1] == [1, 3, 5]

    async def test_a_priority_does_not_count_against_other_projects(
        self, yard: Yard, apis: list[Api]
    ) -> None:
        plain = (await apis[1].start("x")).id
        urgent = [(await apis[0].start("x", priority=100)).id for _ in range(2)]
        assert await all_taken(yard) == [plain, *urgent]

    async def test_a_project_at_its_limit_leaves_its_turn_to_others(
        self, yard: Yard, apis: list[Api]
    ) -> None:
        limits = Limits(total=4, per_project=2)
        mine = [(await apis[0].start("x", priority=9)).id for _ in range(4)]
        theirs = [(await apis[1].start("x")).id for _ in range(3)]
        assert await all_taken(yard, limits=limits) == [mine[0], theirs[0], mine[1], theirs[1]]
        await done(yard, theirs[0])
        assert await all_taken(yard, limits=limits) == [theirs[2]]


async def nothing() -> None:
    pass


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "count"),
        [
            (NO_LIMITS, 5),
            (Limits(total=2), 2),
            (Limits(per_project=1), 2),
            (Limits(per_agent=2), 4),
            (Limits(agents={"scripted": 1}), 4),
            (Limits(per_agent=1, agents={"scripted": 3}), 3),
            (Limits(total=3, per_project=2, per_agent=2), 3),
        ],
    )
    async def test_are_kept(self, yard: Yard, limits: Limits, count: int) -> None:
        """Two of claude and two of another agent in one project, one of claude in the other."""
        for agent in ("scripted", "claude", "scripted", "claude"):
            await start(yard, agent=agent)
        await of_other(yard)
        assert len(await all_taken(yard, limits=limits)) == count

    async def test_a_slot_is_free_again_after_the_end(self, yard: Yard) -> None:
        limits = Limits(per_project=1)
        first, second = await start(yard), await start(yard)
        assert await all_taken(yard, limits=limits) == [first.id]
        await done(yard, first.id)
        assert await all_taken(yard, limits=limits) == [second.id]

    async def test_an_agent_at_its_limit_does_not_hold_up_others(self, yard: Yard) -> None:
        runs = [await start(yard, agent=agent) for agent in ("scripted", "scripted", "claude")]
        limits = Limits(agents={"scripted": 1})
        assert await all_taken(yard, limits=limits) == [runs[0].id, runs[2].id]

    async def test_are_kept_when_a_client_names_another_agent_meanwhile(self, yard: Yard) -> None:
        runs = [await start(yard, agent=agent) for agent in ("scripted", "claude", "claude")]
        await runs[1].patch(state={"agent": "scripted"})
        limits = Limits(agents={"scripted": 1})
        assert await all_taken(yard, limits=limits) == [runs[0].id, runs[2].id]

    async def test_are_never_passed_by_many_workers_at_once(self, yard: Yard) -> None:
        runs = [(await start(yard)).id for _ in range(24)]
        limits, full, most = Limits(per_project=3), asyncio.Event(), 0
        order: list[str] = []

        async def work(name: str) -> None:
            nonlocal most
            while len(order) < len(runs):
                run = await taken(yard, worker(name), limits)
                if run is None:
                    await asyncio.sleep(0)
                    continue
                order.append(run)
                held = await yard.database.fetch("SELECT 1 FROM run_cursors WHERE leased_until IS NOT NULL")
                most = max(most, len(held))
                if most == 3:
                    full.set()
                await full.wait()
                await done(yard, run, name)

        async with asyncio.timeout(60):
            await asyncio.gather(*(work(f"w{number}") for number in range(5)))
        assert sorted(order) == sorted(runs)
        assert most == 3

    async def test_are_passed_neither_after_an_outage(self, yard: Yard) -> None:
        """Every lease has run out, and the workers renew theirs a moment later: their runs still count."""
        first, second = await start(yard), await start(yard)
        assert await all_taken(yard, limits=Limits(total=1)) == [first.id]
        claimed = await store.claim(yard.database, UUID(first.id), "w")
        assert claimed is not None
        await expire(yard.database)
        assert await taken(yard, limits=Limits(total=1)) is None
        assert await store.renew(yard.database, claimed.lease)
        assert await taken(yard, limits=Limits(total=1)) is None
        # Found lost, it is lost: its slot is given away, and it cannot be renewed beside that.
        await expire(yard.database)
        await queue.restore(yard.database, await queue.lost(yard.database))
        assert not await store.renew(yard.database, claimed.lease)
        assert await all_taken(yard, limits=Limits(total=1)) == [first.id]
        assert (await shown(second))["reason"] == "no worker of the pool 'default' is running"


async def expire(database: Database) -> None:
    await database.execute(
        "UPDATE run_cursors SET leased_until = clock_timestamp() - interval '1 s' WHERE leased_until IS NOT NULL"
    )


class TestPools:
    async def environment(self, yard: Yard, pool: str | None) -> str:
        made = await yard.api().post("sandbox_environments/", {"name": "e", "worker_pool": pool})
        assert ok(made, 201)["worker_pool"] == pool
        return str(made.json()["id"])

    async def test_only_workers_of_the_pool_take_it(self, yard: Yard) -> None:
        asked = await self.environment(yard, "gpu")
        run, plain = await start(yard, sandbox_environment_id=asked), await start(yard)
        assert await all_taken(yard) == [plain.id]
        assert await shown(run) == {"position": 1, "reason": "no worker of the pool 'gpu' is running"}
        assert await all_taken(yard, worker("g", pools=("gpu",))) == [run.id]

    async def test_a_worker_of_two_pools(self, yard: Yard) -> None:
        run = await start(yard, sandbox_environment_id=await self.environment(yard, "gpu"))
        plain = await start(yard, sandbox_environment_id=await self.environment(yard, None))
        assert await all_taken(yard, worker("g", pools=("gpu", "default"))) == [run.id, plain.id]

    async def test_a_change_of_the_environment_counts_at_once(self, yard: Yard) -> None:
        asked = await self.environment(yard, "typo")
        run = await start(yard, sandbox_environment_id=asked)
        assert await taken(yard) is None
        ok(await yard.api().patch(f"sandbox_environments/{asked}/", {"worker_pool": None}))
        assert await taken(yard) == run.id

    async def test_a_bad_name_is_refused(self, yard: Yard) -> None:
        for name in ("", "Two words", "-a"):
            answer = await yard.api().post("sandbox_environments/", {"name": "e", "worker_pool": name})
            error(answer, 400, "invalid_input", "worker_pool")

    async def test_an_agent_that_only_others_have(self, yard: Yard) -> None:
        run = await start(yard, agent="scripted")
        lacks = worker("lacks", agents=["claude"])
        await workers.beat(yard.database, worker("has"))
        assert await taken(yard, lacks) is None
        assert await taken(yard, worker("has")) == run.id

    async def test_an_agent_that_only_workers_of_another_pool_have(self, yard: Yard) -> None:
        """A worker that shares a pool with them, but not the run's, does not leave the run to them."""
        both = worker("both", pools=("default", "gpu"), agents=["claude"])
        await workers.beat(yard.database, both)
        await workers.beat(yard.database, worker("has", pools=("gpu",)))
        run = await start(yard, agent="scripted")
        assert await taken(yard, worker("has", pools=("gpu",))) is None
        assert await taken(yard, both) == run.id

    async def test_an_agent_that_nobody_has_fails_with_a_word(self, yard: Yard) -> None:
        run = await start(yard, agent="scripted")
        await workers.beat(yard.database, worker("lacks", agents=["claude"]))
        await workers.beat(yard.database, worker("elsewhere", pools=("gpu",)))
        await workers.beat(yard.database, worker("leaves"), stopping=True)
        assert await taken(yard, worker("lacks", agents=["claude"])) == run.id


class TestShown:
    async def test_nothing_for_a_run_that_does_not_wait(self, yard: Yard) -> None:
        created = await yard.api().create_run(environment="cloud")
        assert await shown(created) is None
        run = await start(yard)
        assert await shown(run) is not None
        await run.cancel()
        assert await shown(run) is None
        driven = await start(yard)
        await all_taken(yard)
        assert await shown(driven) is None

    async def test_positions_are_of_the_own_project(self, yard: Yard) -> None:
        await of_other(yard)
        first, second, urgent = await start(yard), await start(yard), await start(yard, priority=1)
        positions = [(await shown(run))["position"] for run in (urgent, first, second)]
        assert positions == [1, 2, 3]
        await urgent.cancel()
        assert (await shown(second))["position"] == 2

    @pytest.mark.parametrize(
        ("areas", "limits", "capacity", "reason"),
        [
            ({}, NO_LIMITS, 2, "a worker is about to take it"),
            ({}, NO_LIMITS, 1, "all workers of the pool 'default' are busy"),
            ({"limit": 1}, Limits(total=1), 1, "limit of 1 run on this server"),
            ({"limit_per_project": 1}, Limits(per_project=1), 1, "project limit of 1 run"),
            ({"limit_per_agent": 1}, Limits(per_agent=1), 1, "limit of 1 run of the agent 'scripted'"),
        ],
    )
    async def test_reasons(
        self, yard: Yard, areas: dict[str, int], limits: Limits, capacity: int, reason: str
    ) -> None:
        one = worker(capacity=capacity)
        await workers.beat(yard.database, one)
        running, waits = await start(yard, agent="scripted"), await start(yard, agent="scripted")
        assert await taken(yard, one, limits) == running.id
        found = await queue.waiting(yard.database, UUID(waits.id), limits)
        assert found == {"position": 1, "reason": reason}

    async def test_only_workers_that_have_the_agent_count(self, yard: Yard) -> None:
        lacks, has = worker("lacks", agents=["claude"]), worker("has", capacity=1)
        for one in (lacks, has):
            await workers.beat(yard.database, one)
        running, waits = await start(yard, agent="scripted"), await start(yard, agent="scripted")
        assert (await shown(running))["reason"] == "a worker is about to take it"
        assert await taken(yard, has) == running.id
        assert await taken(yard, lacks) is None
        reason = "all workers of the pool 'default' that have the agent 'scripted' are busy"
        assert await shown(waits) == {"position": 1, "reason": reason}

    async def test_a_worker_with_a_full_disk_has_no_room(self, yard: Yard) -> None:
        full, small = worker("full", capacity=0), worker("small", capacity=1)
        await workers.beat(yard.database, full)
        run, waits = await start(yard), await start(yard)
        assert (await shown(run))["reason"] == "all workers of the pool 'default' have a full disk"
        await workers.beat(yard.database, small)
        assert await taken(yard, small) == run.id
        assert (await shown(waits))["reason"] == "all workers of the pool 'default' are busy"
        await workers.beat(yard.database, replace(full, capacity=1))
        assert (await shown(waits))["reason"] == "a worker is about to take it"

    async def test_it_is_never_stored(self, yard: Yard) -> None:
        run = await start(yard)
        state = (await run.fetch())["state"]
        await run.patch(state=state | {"queue": {"position": 0}, "priority": 9, "mine": 1})
        stored = await yard.database.fetch_one("SELECT state FROM runs WHERE id = %(run)s", run=run.id)
        assert stored is not None
        assert stored["state"] == {"mode": "background", "mine": 1}


async def test_only_admins_raise_a_priority(yard: Yard) -> None:
    task = await yard.api("bob").create_task(title="x")
    path = f"tasks/{task['id']}/run/"
    error(await yard.api("bob").post(path, {"priority": 1}), 403, "permission_denied")
    error(await yard.api("bob").post(path, {"priority": 101}), 400, "max_value", "priority")
    lowered = ok(await yard.api("bob").post(path, {"priority": -1}))["latest_run"]
    assert lowered["state"]["priority"] == -1
    await yard.database.execute(
        "UPDATE memberships SET role = 'admin' WHERE user_id = %(bob)s", bob=yard.users["bob"]
    )
    assert ok(await yard.api("bob").post(path, {"priority": 1}))["latest_run"]["state"]["priority"] == 1


class TestSafetyNet:
    """What is left of a run in every state in which its worker, or a transaction, can leave it."""

    async def restored(self, yard: Yard) -> list[str]:
        found = await queue.restore(yard.database, await queue.lost(yard.database))
        return [str(run) for run in found]

    async def test_nothing_to_do(self, yard: Yard) -> None:
        await start(yard)
        await yard.api().create_run(environment="cloud")
        held = await start(yard, priority=1)
        assert await taken(yard) == held.id
        assert await queue.lost(yard.database) == set()

    async def test_taken_and_never_claimed(self, yard: Yard) -> None:
        first, second = await start(yard), await start(yard)
        assert await taken(yard) == first.id
        await expire(yard.database)
        assert await self.restored(yard) == [first.id]
        claims = {"generation": 0, "worker": None, "leased_until": None, "reserved_by": None}
        row = await yard.database.fetch_one("SELECT * FROM run_cursors WHERE run_id = %(run)s", run=first.id)
        assert row is not None
        assert {name: row[name] for name in claims} == claims
        assert await all_taken(yard) == [first.id, second.id]

    async def test_taken_and_claimed_too_late(self, yard: Yard) -> None:
        """A worker that was frozen in between: its slot is another run's by now, and the run waits again."""
        run, limits = await start(yard), Limits(total=1)
        assert await taken(yard, worker("frozen"), limits) == run.id
        await expire(yard.database)
        assert await store.claim(yard.database, UUID(run.id), "other", taken=True) is None
        assert await self.restored(yard) == [run.id]
        urgent = await start(yard, priority=9)
        assert await taken(yard, worker("other"), limits) == urgent.id
        assert await store.claim(yard.database, UUID(run.id), "frozen", taken=True) is None
        assert await store.claim(yard.database, UUID(urgent.id), "other", taken=True) is not None
        assert await taken(yard, worker("frozen"), limits) is None

    async def test_lost_in_the_middle(self, yard: Yard) -> None:
        run = await start(yard)
        await taken(yard)
        assert await store.claim(yard.database, UUID(run.id), "w") is not None
        async with yard.database.transaction() as connection:
            await lifecycle.change(connection, UUID(run.id), status="in_progress")
        await expire(yard.database)
        assert await self.restored(yard) == [run.id]
        await start(yard, priority=100)
        assert await taken(yard, worker("next")) == run.id
        claimed = await store.claim(yard.database, UUID(run.id), "next")
        assert claimed is not None
        assert claimed.resumes == 1

    async def test_neither_held_nor_queued(self, yard: Yard) -> None:
        run = await start(yard)
        await yard.database.execute("DELETE FROM run_queue")
        assert await self.restored(yard) == [run.id]
        assert await taken(yard) == run.id

    async def test_asleep_is_not_lost(self, yard: Yard) -> None:
        await start(yard)
        await yard.database.execute("DELETE FROM run_queue")
        await yard.database.execute("UPDATE run_cursors SET suspended_at = clock_timestamp()")
        assert await queue.lost(yard.database) == set()

    async def test_ended_under_a_dead_worker(self, yard: Yard) -> None:
        """Its next driver only answers who waits; the stream ends before."""
        run = await start(yard)
        await taken(yard)
        assert await store.claim(yard.database, UUID(run.id), "w") is not None
        await run.cancel()
        await expire(yard.database)
        assert await self.restored(yard) == [run.id]
        assert (await run.stream())[-1][1]["status"] == "cancelled"
        assert await taken(yard) == run.id

    async def test_given_back_unclaimed_at_the_end_of_a_worker(self, yard: Yard) -> None:
        run = await start(yard)
        await taken(yard)
        await queue.give_all_back(yard.database, "somebody else")
        assert await taken(yard) is None
        await queue.give_all_back(yard.database, "w")
        assert await taken(yard) == run.id

    async def test_who_cleans_up_still_has_the_slot(self, yard: Yard) -> None:
        run = await start(yard)
        await taken(yard)
        claimed = await store.claim(yard.database, UUID(run.id), "w")
        assert claimed is not None
        await run.cancel()
        ok(await run.api.post(run.path("resume_in_cloud/")))
        assert await taken(yard, worker("next")) is None
        assert await shown(run) == {"position": 1, "reason": "its last worker is still cleaning up"}
        await store.release(yard.database, claimed.lease)
        assert await taken(yard, worker("next")) == run.id

    async def test_ended_in_the_queue(self, yard: Yard) -> None:
        run, told, again = await start(yard), await start(yard), await start(yard)
        await told.command("user_message", content="hello")
        for one in (run, told, again):
            await one.cancel()
        ok(await again.api.post(again.path("resume_in_cloud/")))
        await queue.drop_ended(yard.database)
        # Whoever waits for an answer gets it from a driver.
        assert await all_taken(yard) == [told.id, again.id]


class TestTimeout:
    async def back(self, database: Database, run: Run, seconds: int) -> None:
        await database.execute(
            "UPDATE run_queue SET since = since - make_interval(secs => %(seconds)s) WHERE run_id = %(run)s",
            seconds=seconds,
            run=run.id,
        )

    async def test_fails_with_a_word(self, yard: Yard) -> None:
        late, recent = await start(yard), await start(yard)
        await self.back(yard.database, late, 100)
        assert await queue.time_out(yard.database, 60) == [UUID(late.id)]
        body = await late.fetch()
        assert (body["status"], body["state"]["error_type"]) == ("failed", "queue_timeout")
        assert "within 60 seconds" in body["error_message"]
        assert (await late.stream())[-1][1]["status"] == "failed"
        assert (await recent.fetch())["status"] == "queued"
        assert await queue.time_out(yard.database, 60) == []

    async def test_one_that_was_interrupted_keeps_its_result(self, yard: Yard) -> None:
        given, closed = await start(yard), await start(yard)
        for run, is_open in ((given, True), (closed, False)):
            turn = asdict(Turn(1, "text", open=is_open, result=[{"answer": 7}]))
            await yard.database.execute(
                "UPDATE run_cursors SET turn = %(turn)s WHERE run_id = %(run)s", turn=Jsonb(turn), run=run.id
            )
            await self.back(yard.database, run, 100)
        assert len(await queue.time_out(yard.database, 60)) == 2
        assert (await given.fetch())["output"] == {"answer": 7}
        assert (await closed.fetch())["output"] is None

    async def test_one_that_is_driven_or_ended_is_left_alone(self, yard: Yard) -> None:
        driven, ended = await start(yard), await start(yard)
        await self.back(yard.database, driven, 100)
        await self.back(yard.database, ended, 50)
        await ended.cancel()
        assert await taken(yard) == driven.id
        assert await queue.time_out(yard.database, 10) == []


async def test_nobody_waits_for_each_other(yard: Yard) -> None:
    """Starts, stops, takes and searches of the same runs at once: PostgreSQL would break a deadlock with an error."""
    runs = [await start(yard) for _ in range(4)]
    calls: list[Callable[[], Awaitable[object]]] = []
    for run in runs:
        calls += [run.cancel, lambda run=run: run.api.post(run.path("resume_in_cloud/"))]  # type: ignore[misc]
    calls += [lambda: all_taken(yard), lambda: expire(yard.database)] * 2
    calls += [lambda: self_heal(yard.database), lambda: queue.time_out(yard.database, 1e-6)] * 2
    for _ in range(8):
        await asyncio.gather(*(call() for call in calls))


async def self_heal(database: Database) -> None:
    await queue.restore(database, await queue.lost(database))
    await queue.drop_ended(database)
