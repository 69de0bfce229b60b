"""The mailbox below the API: what a driver takes, and takes again."""

from __future__ import annotations

from taskyard.commands import store
from taskyard.db.engine import Database
from taskyard.runs import store as runs
from tests.support.rows import make_run


async def test_a_command_without_an_answer_comes_again(database: Database) -> None:
    run_id = await make_run(database)
    claimed = await runs.claim(database, run_id, "test")
    assert claimed is not None
    lease = claimed.lease
    await database.execute(
        "INSERT INTO commands (run_id, seq, method, params) VALUES (%(run)s, 1, 'user_message', '{}'),"
        " (%(run)s, 2, 'user_message', '{}')",
        run=run_id,
    )
    first = await store.take(database, lease, ("user_message",), limit=1)
    # As if the connection had broken after the commit: the driver never saw it.
    assert await store.take(database, lease, ("user_message",), limit=1) == first
    await store.answer(database, lease, first[0].seq, result={"queued": True})
    [second] = await store.take(database, lease, ("user_message",), limit=1)
    assert (first[0].seq, second.seq) == (1, 2)
    await store.answer(database, lease, second.seq, result={"queued": True})
    assert await store.take(database, lease, ("user_message",)) == []


async def test_a_message_is_not_ended_by_what_was_to_make_room_for_it(database: Database) -> None:
    run_id = await make_run(database)
    claimed = await runs.claim(database, run_id, "test")
    assert claimed is not None
    await database.execute(
        "INSERT INTO commands (run_id, seq, method, params) VALUES (%(run)s, 1, 'cancel', '{}'),"
        " (%(run)s, 2, 'user_message', '{\"content\": \"plain\"}'),"
        " (%(run)s, 3, 'user_message', '{\"content\": \"now\", \"steer\": true}'), (%(run)s, 4, 'cancel', '{}'),"
        " (%(run)s, 5, 'cancel', '{}')",
        run=run_id,
    )
    async with database.transaction() as connection:
        taken = await store.take_message(connection, claimed.lease)
    assert taken is not None
    assert taken["params"]["content"] == "now"
    for seq in (1, 4):
        reply = await store.answered(database, run_id, seq)
        assert reply is not None
        assert (reply["result"], reply["error"]) == ({"cancelled": True}, None)
    # What came later is for the turn that begins now.
    [later] = await store.take(database, claimed.lease, ("cancel",))
    assert later.seq == 5
    async with database.transaction() as connection:
        taken = await store.take_message(connection, claimed.lease)
    assert taken is not None
    assert taken["params"] == {"content": "plain"}
