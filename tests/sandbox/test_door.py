"""The one way out: a listening socket that the server gets from inside."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest
import uvloop

from taskyard.sandbox.bubblewrap import BubblewrapSandbox
from taskyard.sandbox.provider import SandboxError
from tests.support.sandboxes import Hut, run, shell
from tests.support.served import FETCH, Served


async def test_a_request_reaches_the_server(sandbox: BubblewrapSandbox) -> None:
    served = Served()
    done = await run(sandbox, "python3", "-c", FETCH, on_listener=served.serve)
    await served.close()
    assert done.output == "/hello\n", done.end.stderr_tail


async def test_each_command_has_its_own(sandbox: BubblewrapSandbox) -> None:
    one, two = Served(), Served()
    done = await asyncio.gather(
        run(sandbox, "python3", "-c", FETCH, on_listener=one.serve),
        run(sandbox, "python3", "-c", FETCH, on_listener=two.serve),
    )
    await one.close()
    await two.close()
    assert [each.output for each in done] == ["/hello\n", "/hello\n"]


async def test_without_a_handler_there_is_no_way_out(sandbox: BubblewrapSandbox) -> None:
    done = await run(sandbox, "python3", "-c", FETCH)
    assert done.end.code == 1
    assert "Connection refused" in done.end.stderr_tail


async def test_the_handler_has_returned_before_the_command_begins(sandbox: BubblewrapSandbox) -> None:
    returned = 0.0

    async def handler(listener: socket.socket) -> None:
        nonlocal returned
        listener.close()
        await asyncio.sleep(0.3)
        returned = time.time()

    done = await run(sandbox, "date", "+%s.%N", on_listener=handler)
    assert float(done.output) >= returned


async def test_the_command_replaces_the_helper(sandbox: BubblewrapSandbox) -> None:
    served = Served()
    script = (
        "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline | head -c 9; echo; done; echo pid $$; echo $FOO"
    )
    done = await run(sandbox, "sh", "-c", script, env={"FOO": "bar"}, on_listener=served.serve)
    await served.close()
    assert "pid 2" in done.lines
    assert "bar" in done.lines
    assert not any("python" in line for line in done.lines)


async def test_a_command_that_does_not_exist(sandbox: BubblewrapSandbox) -> None:
    served = Served()
    done = await run(sandbox, "no-such-program", on_listener=served.serve)
    await served.close()
    assert done.end.code == 127
    assert done.end.stderr_tail == "no-such-program: No such file or directory\n"


async def test_a_handler_that_fails_ends_the_command(sandbox: BubblewrapSandbox) -> None:
    async def handler(listener: socket.socket) -> None:
        listener.close()
        raise ValueError("no gateway today")

    with pytest.raises(ValueError, match="no gateway today"):
        await sandbox.exec(["touch", "started"], on_listener=handler)
    assert (await shell(sandbox, "ls")).output == ""


async def test_a_sandbox_that_ends_before_its_listener_is_open(sandbox: BubblewrapSandbox) -> None:
    async def handler(listener: socket.socket) -> None:
        listener.close()

    with pytest.raises(SandboxError, match=r"ended before .* chdir to /nowhere"):
        await sandbox.exec(["true"], cwd="/nowhere", on_listener=handler)


def test_on_uvloop(tmp_path: Path) -> None:
    async def main() -> None:
        hut = Hut(tmp_path / "data")
        served = Served()
        done = await run(await hut.sandbox(), "python3", "-c", FETCH, on_listener=served.serve)
        assert done.output == "/hello\n"
        await served.close()
        await hut.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
