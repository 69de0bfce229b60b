"""The ACP client against small agents over real pipes."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest
import uvloop

from taskyard.agents import jsonrpc
from taskyard.agents.acp import (
    METHOD_NOT_FOUND,
    AcpError,
    AgentGoneError,
    PromptResult,
    ProtocolVersionError,
)
from tests.support.acp_agents import Client, connected, inline

Json = dict[str, Any]
TEXT = [{"type": "text", "text": "go"}]
SELECTED = {"outcome": {"outcome": "selected", "optionId": "allow"}}
ASK = """
def ask(request_id, session="s"):
    option = {"optionId": "allow", "name": "Allow", "kind": "allow_once"}
    params = {"sessionId": session, "toolCall": {"toolCallId": "t"}, "options": [option]}
    send({"id": request_id, "method": "session/request_permission", "params": params})
"""


async def prompt(client: Client) -> PromptResult:
    return await client.connection.prompt("s", TEXT)


async def forever() -> Json:
    """A person who never answers."""
    await asyncio.Event().wait()
    raise AssertionError


# --- the handshake and the session ---


async def test_initialize_offers_nothing_but_the_failure_report() -> None:
    agent = inline(
        'q = read(); answer(q, protocolVersion=1, agentCapabilities={"loadSession": True}, agentInfo={"name": "x"})'
    )
    async with connected(agent) as client:
        answer = await client.connection.initialize({"vendor": {"a": 1}})
        assert answer["agentInfo"] == {"name": "x"}
        assert client.connection.capabilities == {"loadSession": True}
        [sent] = client.sent("initialize")
        capabilities = sent["clientCapabilities"]
        assert capabilities["fs"] == {"readTextFile": False, "writeTextFile": False}
        assert capabilities["terminal"] is False
        assert capabilities["_meta"]["jetbrains"]["air"] == {"version": 1, "capabilities": ["sessionFailure"]}
        assert capabilities["_meta"]["vendor"] == {"a": 1}


@pytest.mark.parametrize("version", ["2", '"1"', "None"])
async def test_another_protocol_version_is_refused(version: str) -> None:
    async with connected(inline(f"answer(read(), protocolVersion={version})")) as client:
        with pytest.raises(ProtocolVersionError, match="this server version 1"):
            await client.connection.initialize()


async def test_new_session_is_read_leniently() -> None:
    agent = inline("""
answer(read(), protocolVersion=1, agentCapabilities={"sessionCapabilities": {"systemPrompt": {}, "close": False}})
q = read()
answer(q, sessionId="s1", modes={"currentModeId": "a", "availableModes": [{"id": "a"}, {"name": "no id"}, 7]},
       configOptions=[{"id": "model"}, None], future={"x": 1})
read()
""")
    async with connected(agent) as client:
        await client.connection.initialize()
        server = {"name": "tool", "command": "/bin/true", "args": [], "env": []}
        session = await client.connection.new_session(
            "/w", [server], {"k": 1}, system_prompt_append="Be brief."
        )
        assert (session.id, session.modes, session.current_mode) == ("s1", ("a",), "a")
        assert session.config_options == ({"id": "model"},)
        assert session.raw["future"] == {"x": 1}
        [sent] = client.sent("session/new")
        assert sent["systemPrompt"] == {"mode": "append", "content": [{"type": "text", "text": "Be brief."}]}
        assert (sent["cwd"], sent["mcpServers"], sent["_meta"]) == ("/w", [server], {"k": 1})
        assert client.connection.offers("systemPrompt")
        await client.connection.close_session("s1")  # not offered: nothing is sent
        await client.connection.set_title("s1", "T")
        assert client.sent("session/close") == []
        assert client.sent("session/set_title") == []


async def test_a_system_prompt_is_sent_only_where_it_is_offered() -> None:
    async with connected(
        inline('answer(read(), protocolVersion=1); answer(read(), sessionId="s")')
    ) as client:
        await client.connection.initialize()
        await client.connection.new_session("/w", system_prompt_append="Be brief.")
        assert "systemPrompt" not in client.sent("session/new")[0]


async def test_new_session_without_an_id_is_an_error() -> None:
    async with connected(inline("answer(read()); read()")) as client:
        with pytest.raises(AcpError, match="without a sessionId"):
            await client.connection.new_session("/w")


async def test_resume_is_preferred_to_load() -> None:
    agent = inline("""
answer(read(), protocolVersion=1, agentCapabilities={"loadSession": True, "sessionCapabilities": {"resume": {}}})
q = read(); update("seen"); send({"id": q["id"], "result": None}); read()
""")
    async with connected(agent) as client:
        await client.connection.initialize()
        session = await client.connection.load_session("s", "/w", meta={"k": 1})
        assert session.id == "s"
        assert client.sent("session/resume") == [
            {"sessionId": "s", "cwd": "/w", "mcpServers": [], "_meta": {"k": 1}}
        ]
        assert client.sent("session/load") == []
        assert client.texts == ["seen"]


async def test_a_replayed_history_is_dropped_up_to_the_answer_and_not_further() -> None:
    agent = inline("""
answer(read(), protocolVersion=1, agentCapabilities={"loadSession": True})
q = read(); update("old 1"); update("other session", "t"); update("old 2")
# One write: answer and news arrive in one read of the client.
lines = [{"jsonrpc": "2.0", "id": q["id"], "result": {"modes": {"currentModeId": "m"}}}]
block = {"type": "text", "text": "new"}
chunk = {"sessionUpdate": "agent_message_chunk", "content": block}
lines.append({"jsonrpc": "2.0", "method": "session/update", "params": {"sessionId": "s", "update": chunk}})
raw("".join(json.dumps(line) + "\\n" for line in lines))
q = read(); answer(q, stopReason="end_turn"); read()
""")
    async with connected(agent) as client:
        await client.connection.initialize()
        session = await client.connection.load_session("s", "/w")
        assert session.current_mode == "m"
        await prompt(client)
        assert client.texts == ["other session", "new"]
        assert sum(way == "in" for way, _ in client.traffic) == 7  # all of it is in the raw traffic


async def test_loading_is_refused_when_the_agent_cannot() -> None:
    async with connected(inline("answer(read(), protocolVersion=1); read()")) as client:
        await client.connection.initialize()
        with pytest.raises(AcpError, match="cannot open earlier sessions"):
            await client.connection.load_session("s", "/w")


async def test_modes_options_models_titles() -> None:
    agent = inline("""
answer(read(), protocolVersion=1, agentCapabilities={"sessionCapabilities": {"title": {}, "close": {}}})
for _ in range(6):
    q = read()
    answer(q, configOptions=[{"id": "effort", "currentValue": "high"}])
read()
""")
    async with connected(agent) as client:
        connection = client.connection
        await connection.initialize()
        await connection.set_mode("s", "plan")
        assert await connection.set_config_option("s", "effort", "high") == (
            {"id": "effort", "currentValue": "high"},
        )
        await connection.set_config_option("s", "fast", True)
        await connection.set_model("s", "m")
        await connection.set_title("s", "T")
        await connection.close_session("s")
        assert client.sent("session/set_mode") == [{"sessionId": "s", "modeId": "plan"}]
        assert client.sent("session/set_title") == [{"sessionId": "s", "title": "T"}]
        assert client.sent("session/close") == [{"sessionId": "s"}]


# --- turns ---


async def test_updates_keep_their_order_and_are_there_when_the_turn_ends() -> None:
    count = 5000
    agent = inline(f"""
q = read()
for n in range({count}): update(n)
answer(q, stopReason="end_turn", usage={{"inputTokens": 1}}); read()
""")
    async with connected(agent) as client:
        result = await prompt(client)
        assert client.texts == [str(n) for n in range(count)]
        assert (result.stop_reason, result.usage, result.failure) == ("end_turn", {"inputTokens": 1}, None)


async def test_a_request_that_waits_does_not_hold_up_updates() -> None:
    released = asyncio.Event()

    async def slow(method: str, params: Json) -> Json:
        await released.wait()
        return SELECTED

    agent = inline(
        ASK
        + """
q = read(); ask("p1")
for n in range(500): update(n)
r = read(); update(r["id"]); answer(q, stopReason="end_turn"); read()
"""
    )
    async with connected(agent, on_request=slow) as client:
        turn = asyncio.create_task(prompt(client))
        await client.until(lambda: len(client.updates) == 500, "500 updates while a request is open")
        released.set()
        await turn
        assert client.texts == [*(str(n) for n in range(500)), "p1"]


async def test_a_failed_turn_that_says_end_turn_is_told() -> None:
    agent = inline("""
def failed(q, failure):
    meta = {"jetbrains": {"air": {"version": 1, "sessionFailure": failure}}}
    answer(q, stopReason="end_turn", usage=None, _meta=meta)
failed(read(), {"category": "limit", "severity": "error", "title": "Too many requests"})
failed(read(), {"category": "limit", "severity": "warning", "title": "Soon"})
failed(read(), {})
read()
""")
    async with connected(agent) as client:
        failure = (await prompt(client)).failure
        assert failure is not None
        assert (failure.category, failure.title) == ("limit", "Too many requests")
        assert (await prompt(client)).failure is None
        failure = (await prompt(client)).failure
        assert failure is not None
        assert failure.category == "unknown"


async def test_what_is_unknown_passes_through() -> None:
    agent = inline("""
q = read()
send({"method": "session/update", "params": {"sessionId": "s", "update": {"sessionUpdate": "from_the_future"}}})
send({"method": "session/update", "params": {"sessionId": ["no", "text"], "update": None}})
send({"method": "session/update"})
send({"method": "_vendor/notice", "params": [1]})
send({"id": q["id"], "result": {"stopReason": "tired", "usage": "much", "_meta": [1]}})
read()
""")
    async with connected(agent) as client:
        result = await prompt(client)
        assert (result.stop_reason, result.usage, result.failure) == ("tired", None, None)
        assert client.updates == [
            {"sessionId": "s", "update": {"sessionUpdate": "from_the_future"}},
            {"sessionId": ["no", "text"], "update": None},
            {},
        ]


async def test_errors_of_the_agent() -> None:
    agent = inline("""
send({"id": read()["id"], "error": {"code": -32000, "message": "Authentication required", "data": {"k": 1}}})
send({"id": read()["id"], "error": {"code": 429, "message": None}})
send({"id": read()["id"], "error": "broken"})
send({"id": read()["id"], "result": [1]})
answer(read(), stopReason="end_turn")
read()
""")
    async with connected(agent) as client:
        with pytest.raises(AcpError, match="Authentication required") as caught:
            await prompt(client)
        assert (caught.value.rpc_code, caught.value.data) == (-32000, {"k": 1})
        with pytest.raises(AcpError, match="gave no reason") as caught:
            await prompt(client)
        assert caught.value.rpc_code == 429
        for _ in range(2):
            with pytest.raises(AcpError, match="session/prompt"):
                await prompt(client)
        assert (await prompt(client)).stop_reason == "end_turn"


async def test_cancel_answers_an_open_permission_request() -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def person(method: str, params: Json) -> Json:
        asked.set()
        try:
            return await forever()
        finally:
            ended.set()

    agent = inline(
        ASK
        + """
q = read(); ask(0); other = read(); cancel = read(); reply = read()
update(json.dumps([other["params"], cancel["params"], reply["id"], reply["result"]]))
answer(q, stopReason="cancelled"); read()
"""
    )
    async with connected(agent, on_request=person) as client:
        turn = asyncio.create_task(prompt(client))
        await asked.wait()
        await client.connection.cancel("another")
        assert not ended.is_set()
        await client.connection.cancel("s")
        assert (await turn).stop_reason == "cancelled"
        await ended.wait()
        cancelled = {"outcome": {"outcome": "cancelled"}}
        assert json.loads(client.texts[0]) == [{"sessionId": "another"}, {"sessionId": "s"}, 0, cancelled]


async def test_after_cancel_a_late_request_is_answered_and_the_next_turn_is_free() -> None:
    asked: list[str] = []
    open_ = asyncio.Event()

    async def person(method: str, params: Json) -> Json:
        asked.append(params["toolCall"]["toolCallId"])
        if len(asked) > 1:
            return SELECTED
        open_.set()
        return await forever()

    agent = inline(
        ASK
        + """
q = read(); ask(0)
while True:
    m = read()
    if m.get("id") == 0: break
ask(1)
while True:
    m2 = read()
    if m2.get("id") == 1: break
update(m["result"]["outcome"]["outcome"]); update(m2["result"]["outcome"]["outcome"])
answer(q, stopReason="cancelled")
while True:
    q = read()
    if q["method"] == "session/prompt": break
ask("two"); r = read(); update(r["result"]["outcome"]["optionId"]); answer(q, stopReason="end_turn"); read()
"""
    )
    async with connected(agent, on_request=person) as client:
        turn = asyncio.create_task(prompt(client))
        await open_.wait()
        await client.connection.cancel("s")
        await client.connection.cancel("s")  # twice is no harm
        assert (await turn).stop_reason == "cancelled"
        assert (await prompt(client)).stop_reason == "end_turn"
        assert client.texts == ["cancelled", "cancelled", "allow"]
        assert len(asked) == 2


# --- requests of the agent ---


async def test_requests_get_their_answers_under_their_own_ids() -> None:
    async def handler(method: str, params: Json) -> Json:
        if method == "session/request_permission":
            return SELECTED
        if method == "boom":
            raise ValueError("secret of the host")
        raise AcpError(METHOD_NOT_FOUND, f"unknown: {method}", {"k": 1})

    agent = inline(
        ASK
        + """
q = read()
replies = []
for request_id in (0, "0", 7.5, "abc"):
    ask(request_id); replies.append(read())
send({"id": 9, "method": "craft/drain"}); replies.append(read())
send({"id": 10, "method": "boom", "params": {}}); replies.append(read())
send({"id": None, "method": "note"}); send({"id": {"a": 1}, "method": "note"})
update(json.dumps(replies)); answer(q, stopReason="end_turn"); read()
"""
    )
    async with connected(agent, on_request=handler) as client:
        await prompt(client)
        replies = json.loads(client.texts[0])
        assert [reply["id"] for reply in replies] == [0, "0", 7.5, "abc", 9, 10]
        assert all(reply["result"] == SELECTED for reply in replies[:4])
        assert replies[4]["error"] == {"code": -32601, "message": "unknown: craft/drain", "data": {"k": 1}}
        assert replies[5]["error"] == {"code": -32603, "message": "Internal error"}


async def test_answers_with_odd_ids() -> None:
    agent = inline("""
q = read()
send({"id": str(q["id"]), "result": {"stopReason": "end_turn"}})
send({"id": "9" * 5000, "result": {}}); send({"id": 99, "result": {}}); send({"id": None, "error": {}})
send({"id": [1], "result": {}}); send({"id": q["id"], "result": {"stopReason": "twice"}})
q = read(); answer(q, stopReason="end_turn"); read()
""")
    async with connected(agent) as client:
        assert (await prompt(client)).stop_reason == "end_turn"
        assert (await prompt(client)).stop_reason == "end_turn"


async def test_open_requests_are_bounded() -> None:
    async def never(method: str, params: Json) -> Json:
        return await forever()

    agent = inline(
        ASK
        + f"""
q = read()
for n in range({jsonrpc.MAX_SERVED} + 1): ask(n)
r = read(); update(json.dumps([r["id"], r["error"]["code"]])); answer(q, stopReason="end_turn"); read()
"""
    )
    async with connected(agent, on_request=never) as client:
        await prompt(client)
        assert client.texts == [f"[{jsonrpc.MAX_SERVED}, {jsonrpc.BUSY}]"]


# --- lines ---


async def test_a_line_of_four_megabytes() -> None:
    async with connected(
        inline('q = read(); update("x" * 4_000_000); answer(q, stopReason="end_turn"); read()')
    ) as client:
        await prompt(client)
        assert [len(text) for text in client.texts] == [4_000_000]


async def test_a_prompt_of_four_megabytes() -> None:
    agent = inline(
        'q = read(); update(len(q["params"]["prompt"][0]["text"])); answer(q, stopReason="end_turn"); read()'
    )
    async with connected(agent) as client:
        await client.connection.prompt("s", [{"type": "text", "text": "é" * 4_000_000}])
        assert client.texts == ["4000000"]


async def test_a_line_beyond_the_limit_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonrpc, "MAX_LINE", 1_000_000)
    agent = inline(
        'q = read(); update("a"); update("x" * 3_000_000); update("b"); answer(q, stopReason="end_turn"); read()'
    )
    async with connected(agent) as client:
        await prompt(client)
        assert client.texts == ["a", "b"]
        assert client.noise == ["a line of more than 1000000 bytes was dropped"]


async def test_what_is_no_message_is_noise_and_bounded() -> None:
    agent = inline("""
q = read()
raw('Loading model...\\n\\n   \\n{"jsonrpc": "2.0", "meth\\n[1, 2]\\n"text"\\n{}\\n' + "y" * 9000 + "\\n")
update("in between")
raw("spam\\n" * 100_000)
answer(q, stopReason="end_turn"); read()
""")
    async with connected(agent) as client:
        await prompt(client)
        assert client.texts == ["in between"]
        assert client.noise[:5] == ["Loading model...", '{"jsonrpc": "2.0", "meth', "[1, 2]", '"text"', "{}"]
        assert client.noise[5] == "y" * jsonrpc.NOISE_CHARACTERS
        assert len(client.noise) == jsonrpc.NOISE_LINES
        assert "dropped" in client.noise[-1]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b'["\xff"]', ["\ufffd"]),
        (b'["\\ud83d"]', ["?"]),
        (b"[NaN, 1]", [None, 1]),
        (b'{"a": 18446744073709551616}', {"a": 18446744073709551616}),
        (b"[1e999]", None),
        (b"1" * 5000, None),
        (b'{"a":' * 100_000, None),
        (b"", None),
    ],
)
def test_lines_as_programs_write_them(line: bytes, value: object) -> None:
    assert jsonrpc.decode(line) == value
    jsonrpc.encode({"value": jsonrpc.decode(line)})  # what was read can be written


def test_lone_surrogates_are_written_as_question_marks() -> None:
    assert jsonrpc.encode({"a": "x\ud83d"}) == b'{"a": "x?"}'


# --- the end, deadlines, back pressure ---


async def test_the_end_of_the_output_fails_what_waits() -> None:
    agent = inline('q = read(); update("last words"); os._exit(3)')
    async with connected(agent) as client:
        with pytest.raises(AgentGoneError):
            await prompt(client)
        assert client.texts == ["last words"]
        await client.connection.wait_ended()
        with pytest.raises(AgentGoneError):
            await prompt(client)
        with pytest.raises(AgentGoneError):
            await client.connection.cancel("s")


async def test_a_last_line_without_newline_counts() -> None:
    agent = inline("""
reply = {"jsonrpc": "2.0", "id": read()["id"], "result": {"stopReason": "end_turn"}}
raw(json.dumps(reply)); os._exit(0)
""")
    async with connected(agent) as client:
        assert (await prompt(client)).stop_reason == "end_turn"


async def test_an_agent_that_is_gone_before_the_first_message() -> None:
    async with connected([sys.executable, "-I", "-c", "raise SystemExit(1)"]) as client:
        await client.process.wait()
        with pytest.raises(AgentGoneError):
            await client.connection.initialize()


async def test_the_end_cancels_open_requests_of_the_agent() -> None:
    ended = asyncio.Event()

    async def person(method: str, params: Json) -> Json:
        try:
            return await forever()
        finally:
            ended.set()

    async with connected(inline(ASK + "ask(1); ask(2)"), on_request=person) as client:
        await client.connection.wait_ended()
        await ended.wait()


async def test_a_deadline_of_the_caller_leaves_the_connection_usable() -> None:
    agent = inline("""
q1 = read(); q2 = read(); answer(q1, stopReason="late"); answer(q2, stopReason="end_turn"); read()
""")
    async with connected(agent) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await prompt(client)
        assert (await prompt(client)).stop_reason == "end_turn"


async def test_a_defect_of_a_callback_is_loud() -> None:
    def broken(update: Json) -> None:
        raise KeyError("defect")

    async with connected(inline("q = read(); update(1); read()"), on_update=broken) as client:
        with pytest.raises(RuntimeError) as caught:
            await prompt(client)
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(RuntimeError):
            await prompt(client)


async def test_a_slow_consumer_holds_the_agent_back() -> None:
    room, waiting = asyncio.Event(), asyncio.Event()

    async def before_read() -> None:
        waiting.set()
        await room.wait()

    agent = inline("""
q = read()
for n in range(100): update("x" * 100_000)
answer(q, stopReason="end_turn"); read()
""")
    async with connected(agent, before_read=before_read) as client:
        turn = asyncio.create_task(prompt(client))
        for _ in range(3):
            await waiting.wait()
            assert not turn.done()
            seen = len(client.updates)
            waiting.clear()
            room.set()  # for one read
            room.clear()
            await client.until(waiting.is_set, "the next read")
            assert len(client.updates) - seen <= 3  # a read is 256 kB at most
        room.set()
        await turn
        assert len(client.texts) == 100


async def test_close_does_not_wait_for_an_agent_that_reads_nothing() -> None:
    async with connected([sys.executable, "-I", "-c", "import time; time.sleep(300)"]) as client:
        turn = asyncio.create_task(client.connection.prompt("s", [{"type": "text", "text": "x" * 3_000_000}]))
        await client.until(lambda: bool(client.sent("session/prompt")), "the prompt")
        async with asyncio.timeout(10):
            await client.connection.close()
            await client.connection.close()
        with pytest.raises(AgentGoneError, match="closed"):
            await turn


async def test_last_message_at_is_the_time_of_messages_not_of_noise() -> None:
    agent = inline(
        'q = read(); raw("noise\\n"); read(); update("x"); answer(q, stopReason="end_turn"); read()'
    )
    async with connected(agent) as client:
        start = client.connection.last_message_at
        turn = asyncio.create_task(prompt(client))
        await client.until(lambda: bool(client.noise), "noise")
        assert client.connection.last_message_at == start
        await client.connection.cancel("s")
        await turn
        assert start < client.connection.last_message_at <= asyncio.get_running_loop().time()


def test_it_works_on_uvloop() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test_a_line_of_four_megabytes())
        runner.run(test_the_end_of_the_output_fails_what_waits())
        runner.run(test_close_does_not_wait_for_an_agent_that_reads_nothing())
