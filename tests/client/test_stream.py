"""A stream that is followed across cuts: nothing lost, nothing repeated, and it ends."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from taskyard.client import AsyncTaskyard, ClientError, Event, StreamLostError, Taskyard, following
from tests.support.tasks_server import (
    RUN,
    RUN_PATH,
    TASK,
    Connection,
    Seen,
    StandIn,
    bearer,
    message,
    run_json,
    state,
    tasks_server,
)

Collect = Callable[..., list[Event]]


@pytest.fixture
def server() -> Iterator[StandIn]:
    with tasks_server() as stand_in:
        stand_in.run("completed")
        yield stand_in


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delays a hundred times shorter."""
    monkeypatch.setattr(following, "FIRST_DELAY_S", 0.002)
    monkeypatch.setattr(following, "MAX_DELAY_S", 0.3)


def collect_blocking(server: StandIn, last: str | None = None, **options: Any) -> list[Event]:
    with Taskyard(server.url, "key") as yard:
        return list(yard.stream(TASK, RUN, last, **options))


def collect_async(server: StandIn, last: str | None = None, **options: Any) -> list[Event]:
    async def go() -> list[Event]:
        async with AsyncTaskyard(server.url, "key") as yard:
            return [event async for event in yard.stream(TASK, RUN, last, **options)]

    return asyncio.run(go())


@pytest.fixture(params=[collect_blocking, collect_async], ids=["blocking", "async"])
def collect(request: pytest.FixtureRequest) -> Collect:
    chosen: Collect = request.param
    return chosen


def a_run(length: int) -> list[tuple[str, str]]:
    texts = [message(number, f"text {number} \u2028 é 漢", ensure_ascii=False) for number in range(2, length)]
    return [state(1, "in_progress"), *texts, state(length, "completed")]


def frames_size(server: StandIn) -> int:
    return sum(len(f"id: {i}\ndata: {d}\n\n".encode()) for i, d in server.events)


def received(events: list[Event]) -> list[tuple[str | None, str]]:
    return [(event.id, event.raw) for event in events]


def test_whole_stream(server: StandIn, collect: Collect) -> None:
    server.events = a_run(20)
    events = collect(server)
    assert received(events) == server.events
    assert (events[0].type, events[1].method) == ("task_run_state", "session/update")
    assert events[1].update["content"]["text"] == "text 2 \u2028 é 漢"
    (request,) = server.streams()
    assert request.headers["accept"] == "text/event-stream"
    assert "last-event-id" not in request.headers
    assert bearer(request) == "key"


def test_cut_at_every_byte(server: StandIn, collect: Collect) -> None:
    server.events = a_run(3)
    for upto in range(0, frames_size(server) + 1, 3):
        server.connections = [Connection(upto=upto, end="cut", piece=11)]
        assert received(collect(server)) == server.events, f"cut after {upto} bytes"


def test_clean_close_anywhere_although_the_run_has_ended(server: StandIn, collect: Collect) -> None:
    """A proxy may close a connection in good order in the middle; an ended run alone is no proof."""
    server.events = a_run(6)
    for upto in range(1, frames_size(server) + 1, 13):
        server.connections = [Connection(upto=upto)]
        assert received(collect(server)) == server.events, f"closed after {upto} bytes"


def test_many_troubles_in_a_row(server: StandIn, collect: Collect) -> None:
    chance = random.Random(7)
    server.events = a_run(60)
    for _ in range(40):
        upto, piece = chance.randrange(1500), chance.randrange(1, 400)
        server.connections.append(
            chance.choice(
                [
                    Connection(upto=upto, end="cut", piece=piece),
                    Connection(upto=upto, piece=piece),
                    Connection(status=503),
                    Connection(upto=0, after=b'event: error\ndata: {"error": "gone"}\n\n'),
                    Connection(before=b": hello\n\nevent: keepalive\ndata: {}\n\n", upto=upto, end="cut"),
                ]
            )
        )
    server.answers["GET", RUN_PATH] = lambda _: (
        200,
        run_json("completed" if not server.connections else "queued"),
    )
    assert received(collect(server)) == server.events


def test_goes_on_behind_the_last_event(server: StandIn, collect: Collect) -> None:
    server.events = a_run(5)
    assert received(collect(server, server.events[2][0])) == server.events[3:]
    assert server.streams()[0].headers["last-event-id"] == server.events[2][0]


def test_reads_the_run_and_connects_again_until_it_has_ended(server: StandIn, collect: Collect) -> None:
    server.events = [state(1, "in_progress")]
    looks = 0

    def run_answer(_: Seen) -> tuple[int, Any]:
        nonlocal looks
        looks += 1
        if looks == 4:
            server.events.append(state(2, "failed"))
        return 200, run_json("failed" if looks >= 4 else "in_progress")

    server.answers["GET", RUN_PATH] = run_answer
    assert received(collect(server)) == server.events
    assert [request.headers.get("last-event-id") for request in server.streams()] == [
        None,
        *[server.events[0][0]] * 3,
    ]


def test_keepalives_and_what_is_no_json_are_passed_over(server: StandIn, collect: Collect) -> None:
    server.events = a_run(3)
    noise = b'data: {"type": "keepalive"}\n\nevent: keepalive\ndata: x\n\nid: 9-9\ndata: not json\n\ndata: [1]\n\n'
    server.connections = [Connection(before=noise)]
    assert received(collect(server)) == server.events


@pytest.mark.parametrize("status", [401, 403, 404, 406])
def test_final_answers(server: StandIn, collect: Collect, status: int) -> None:
    server.connections = [Connection(status=status)] * 2
    with pytest.raises(ClientError, match=f"refused with {status}") as caught:
        collect(server)
    assert caught.value.status == status
    assert len(server.streams()) == 1


def test_a_run_that_is_not_there_is_final(server: StandIn, collect: Collect) -> None:
    del server.answers["GET", RUN_PATH]
    with pytest.raises(ClientError, match="Not found"):
        collect(server)
    assert server.streams() == []


def test_an_answer_that_is_no_stream_is_final(server: StandIn, collect: Collect) -> None:
    server.connections = [Connection(content_type="text/html")]
    with pytest.raises(ClientError, match="no event stream but text/html"):
        collect(server)


def test_gives_up_after_too_many_failures(server: StandIn, collect: Collect) -> None:
    server.connections = [Connection(status=503)] * 9
    heard: list[tuple[str, float]] = []
    with pytest.raises(StreamLostError, match="4 times in a row, last: refused with 503"):
        collect(server, max_failures=3, on_retry=lambda reason, delay: heard.append((reason, delay)))
    assert heard == [("refused with 503", delay) for delay in (0.002, 0.004, 0.008)]


def test_waits_as_long_as_a_busy_server_says(
    server: StandIn, collect: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "MAX_RETRY_AFTER_S", 0.05)
    server.connections = [
        Connection(status=429, retry_after=said) for said in ("7", "0", "soon", "\u00b2", "-1")
    ]
    server.events = a_run(3)
    delays: list[float] = []
    assert received(collect(server, on_retry=lambda _, delay: delays.append(delay))) == server.events
    assert delays == [0.05, 0.004, 0.008, 0.016, 0.032]


def test_a_stream_that_always_closes_within_its_first_event_is_given_up(
    server: StandIn, collect: Collect
) -> None:
    server.events = a_run(3)
    server.connections = [Connection(upto=30)] * 5
    with pytest.raises(StreamLostError, match="4 times in a row, last: the connection was cut"):
        collect(server, max_failures=3)


def test_an_event_forgives_earlier_failures(server: StandIn, collect: Collect) -> None:
    server.events = a_run(4)
    one = len(f"id: {server.events[0][0]}\ndata: {server.events[0][1]}\n\n")
    server.connections = [*[Connection(status=503)] * 3, Connection(upto=one, end="cut")]
    server.connections += [Connection(status=503), Connection(status=502)]
    assert received(collect(server, max_failures=3)) == server.events


def test_keepalives_forgive_nothing(server: StandIn, collect: Collect) -> None:
    keepalive = b'event: keepalive\ndata: {"type":"keepalive"}\n\n'
    server.connections = [Connection(before=keepalive, upto=len(keepalive), end="cut")] * 4
    server.events = a_run(3)
    with pytest.raises(StreamLostError, match="3 times in a row"):
        collect(server, max_failures=2)


def test_an_error_frame_of_an_ended_run_is_the_end(server: StandIn, collect: Collect) -> None:
    error = b'event: error\ndata: {"error": "Stream not available"}\n\n'
    server.connections = [Connection(before=error, upto=len(error))]
    with pytest.raises(
        StreamLostError, match="the run has ended and its stream is gone: Stream not available"
    ):
        collect(server)


def test_events_arrive_while_the_connection_is_open(server: StandIn) -> None:
    """The first event is given out while the server still holds the second one back."""
    server.events = a_run(3)
    first = len(f"id: {server.events[0][0]}\ndata: {server.events[0][1]}\n\n")
    gate = threading.Event()
    server.connections = [Connection(piece=first, gate=gate)]
    with Taskyard(server.url, "key") as yard:
        stream = yard.stream(TASK, RUN)
        assert next(stream).raw == server.events[0][1]
        assert not gate.is_set()
        gate.set()
        assert received(list(stream)) == server.events[1:]


def test_server_away_for_a_while(server: StandIn, collect: Collect) -> None:
    """The run itself cannot be read for some tries."""
    server.events = a_run(4)
    answers = iter([500, 502, 503])
    server.answers["GET", RUN_PATH] = lambda _: (
        (status, {"error": "away"}) if (status := next(answers, None)) else (200, run_json("completed"))
    )
    assert received(collect(server)) == server.events
