"""JSON-RPC 2.0 over two byte streams, one message a line: the framing of ACP over stdio.

The other side is a program that runs unknown code, so this side is lenient in what it reads and bounded
in what it keeps: a line that is no message is noise, an answer nobody waits for is dropped, and the end
of the output fails whatever still waits. Messages are handled in the order they came; requests of the
other side run as tasks, because one of them may wait for a person.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import structlog

from taskyard.errors import TaskyardError

log = structlog.get_logger()

Json = dict[str, Any]
Handler = Callable[[str, Json], Awaitable[Json]]

MAX_LINE = 64 * 1024 * 1024
READ_SIZE = 256 * 1024
NOISE_LINES = 200
NOISE_CHARACTERS = 2000
MAX_SERVED = 64
"""Requests of the agent that may be open at once."""

PARSE_ERROR = -32700
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
BUSY = -32000


class AcpError(TaskyardError):
    """The agent answered with an error.

    Also raised by the handler of the agent's requests, to answer with an error. `rpc_code` is the
    JSON-RPC code (`code` is the HTTP envelope's), `message` and `data` are the agent's own.
    """

    code = "agent_error"

    def __init__(self, rpc_code: int, message: str, data: Any = None) -> None:
        super().__init__(f"{message} (code {rpc_code})")
        self.rpc_code = rpc_code
        self.message = message
        self.data = data

    def reply(self) -> Json:
        """The `error` member of a response."""
        error: Json = {"code": self.rpc_code, "message": self.message}
        return error if self.data is None else {**error, "data": self.data}


class AgentGoneError(TaskyardError):
    """The agent's output ended; its exit code and the end of its standard error say why."""

    code = "agent_gone"


@dataclass(eq=False)
class _Pending:
    """A request of ours. Stays until its answer comes, also when nobody waits any more."""

    method: str
    answer: asyncio.Future[Any]
    on_answer: Callable[[], None] | None


@dataclass(eq=False)
class Served:
    """A request of the agent that has no answer yet."""

    id: int | float | str
    method: str
    params: Json
    task: asyncio.Task[None] | None = field(default=None)


class JsonRpcConnection:
    """One connection; must be made while the event loop runs, and reads from then on.

    on_notification and on_traffic are called synchronously, in order. A defect there (any exception)
    ends the connection and reaches everybody who waits. on_noise gets lines that are no messages, cut
    to NOISE_CHARACTERS, and at most NOISE_LINES of them. before_read is awaited before each read, which
    is how a slow consumer slows the agent down.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        on_notification: Callable[[str, Json], None],
        on_request: Handler,
        on_traffic: Callable[[Literal["in", "out"], Json], None] | None = None,
        on_noise: Callable[[str], None] | None = None,
        before_read: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_notification = on_notification
        self._on_request = on_request
        self._on_traffic = on_traffic
        self._on_noise = on_noise
        self._before_read = before_read
        self._noise = 0
        self._next_id = 0
        self._pending: dict[int | float, _Pending] = {}
        self.served: set[Served] = set()
        self._end: BaseException | None = None
        self._ended = asyncio.Event()
        self.last_message_at = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._read(), name="acp-read")

    # --- our side ---

    async def request(self, method: str, params: Json, on_answer: Callable[[], None] | None = None) -> Any:
        """Send a request and wait for its result.

        on_answer is called while the answer is being read, before any later message is. Cancelling the
        wait (asyncio.timeout) does no harm: a late answer is dropped. Raises AcpError, AgentGoneError.
        """
        self._next_id += 1
        pending = _Pending(method, asyncio.get_running_loop().create_future(), on_answer)
        self._write({"id": self._next_id, "method": method, "params": params})
        self._pending[self._next_id] = pending
        await self._drain()
        return await pending.answer

    async def notify(self, method: str, params: Json) -> None:
        self._write({"method": method, "params": params})
        await self._drain()

    def answer_early(self, request: Served, result: Json) -> None:
        """Answer a request of the agent in place of its handler, which is cancelled."""
        if request in self.served:
            self._answer(request, {"result": result})
            if request.task is not None:
                request.task.cancel()

    async def wait_ended(self) -> None:
        """Return when nothing can arrive any more."""
        await self._ended.wait()

    async def close(self) -> None:
        """End the connection and close the agent's input. Whoever still waits gets AgentGoneError."""
        self._finish(AgentGoneError("The connection to the agent was closed."))
        tasks = [request.task for request in self.served if request.task is not None]
        self.served.clear()
        for task in (self._task, *tasks):
            task.cancel()
        await asyncio.gather(self._task, *tasks, return_exceptions=True)
        if self._writer.transport.get_write_buffer_size():
            self._writer.transport.abort()  # the agent does not read; flushing would wait for it
        else:
            self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def _write(self, message: Json) -> None:
        if self._end is not None:
            raise self._ending()
        message = {"jsonrpc": "2.0", **message}
        self._writer.write(encode(message) + b"\n")
        if self._on_traffic is not None:
            self._on_traffic("out", message)

    async def _drain(self) -> None:
        # A broken pipe is not raised here: what the agent said before it went is still to be read, and
        # the end of its output then fails the request.
        with suppress(OSError):
            await self._writer.drain()

    # --- the agent's side ---

    async def _read(self) -> None:
        lines = _Lines()
        try:
            while True:
                if self._before_read is not None:
                    await self._before_read()
                chunk = await self._reader.read(READ_SIZE)
                for line in lines.feed(chunk) if chunk else lines.rest():
                    self._receive(line)
                if not chunk:
                    break
            self._finish(AgentGoneError())
        except OSError as error:
            self._finish(AgentGoneError(f"Reading the agent's output failed: {error}"))
        except Exception as error:  # a defect of a callback: loud, not a silent stall
            log.exception("agent_connection_failed")
            self._finish(error)

    def _receive(self, line: bytes | None) -> None:
        if line is None:
            self._report_noise(f"a line of more than {MAX_LINE} bytes was dropped")
            return
        message = decode(line)
        if not isinstance(message, dict) or not ("method" in message or "id" in message):
            if line.strip():
                self._report_noise(line[: 4 * NOISE_CHARACTERS].decode("utf-8", "replace"))
            return
        self.last_message_at = asyncio.get_running_loop().time()
        if self._on_traffic is not None:
            self._on_traffic("in", message)
        method, request_id = message.get("method"), message.get("id")
        if not isinstance(method, str):
            self._receive_answer(request_id, message)
            return
        params = message.get("params")
        if not isinstance(params, dict):
            params = {}
        if isinstance(request_id, int | float | str):
            self._serve(Served(request_id, method, params))
        else:
            self._on_notification(method, params)

    def _receive_answer(self, request_id: Any, message: Json) -> None:
        if isinstance(request_id, str) and request_id.isdecimal() and len(request_id) < 20:
            request_id = int(request_id)  # some programs answer with the id as a string
        pending = self._pending.pop(request_id, None) if isinstance(request_id, int | float) else None
        if pending is None:
            return
        if pending.on_answer is not None:
            pending.on_answer()
        if pending.answer.done():
            return
        error = message.get("error")
        if error is None:
            pending.answer.set_result(message.get("result"))
        elif isinstance(error, dict) and isinstance(error.get("code"), int):
            text = str(error.get("message") or "The agent gave no reason.")
            pending.answer.set_exception(AcpError(error["code"], text, error.get("data")))
        else:
            pending.answer.set_exception(AcpError(INTERNAL_ERROR, f"{pending.method} failed", error))

    def _serve(self, request: Served) -> None:
        self.served.add(request)
        if len(self.served) > MAX_SERVED:
            self._answer(request, {"error": AcpError(BUSY, "Too many open requests").reply()})
            return
        request.task = asyncio.create_task(self._handle(request), name=f"acp-{request.method}")

    async def _handle(self, request: Served) -> None:
        reply: Json
        try:
            reply = {"result": await self._on_request(request.method, request.params)}
        except AcpError as error:
            reply = {"error": error.reply()}
        except Exception:  # the agent learns nothing of it: the text may name things of the host
            log.exception("agent_request_failed", method=request.method)
            reply = {"error": AcpError(INTERNAL_ERROR, "Internal error").reply()}
        if request in self.served:
            self._answer(request, reply)
            await self._drain()

    def _answer(self, request: Served, reply: Json) -> None:
        self.served.discard(request)
        if self._end is None:
            self._write({"id": request.id, **reply})

    def _report_noise(self, text: str) -> None:
        self._noise += 1
        if self._on_noise is not None and self._noise <= NOISE_LINES:
            last = self._noise == NOISE_LINES
            self._on_noise(
                "further output that is no message is dropped" if last else text[:NOISE_CHARACTERS]
            )

    # --- the end ---

    def _finish(self, end: BaseException) -> None:
        if self._end is not None:
            return
        self._end = end
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(self._ending())
        self._pending.clear()
        for request in self.served:
            if request.task is not None:
                request.task.cancel()
        self._ended.set()

    def _ending(self) -> BaseException:
        """A fresh exception for each waiter: a shared one would collect all their tracebacks."""
        if isinstance(self._end, AgentGoneError):
            return AgentGoneError(self._end.detail)
        error = RuntimeError("handling a message of the agent failed")
        error.__cause__ = self._end
        return error


class _Lines:
    """Splits a byte stream at newlines; None stands for a line of more than MAX_LINE bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        *ends, tail = chunk.split(b"\n")
        for end in ends:
            self._add(end)
            yield from self.rest()
        self._add(tail)

    def rest(self) -> Iterator[bytes | None]:
        """The line so far, if there is one."""
        parts, size = self._parts, self._size
        self._parts, self._size = [], 0
        if size > MAX_LINE:
            yield None
        elif size:
            yield b"".join(parts)

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= MAX_LINE:
            self._parts.append(part)
        else:
            self._parts.clear()


def encode(message: Json) -> bytes:
    """JSON in UTF-8; lone surrogates, which have no UTF-8 form, become question marks."""
    try:
        return msgspec.json.encode(message)
    except UnicodeEncodeError:
        return json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")


def decode(line: bytes) -> Any:
    """The value in a line, or None. Accepts what programs really write: bytes that are no UTF-8, lone
    surrogates and NaN, which are replaced so that the value can be written again as strict JSON.
    """
    try:
        return msgspec.json.decode(line)
    except (ValueError, RecursionError):
        pass
    try:
        value = json.loads(line.decode("utf-8", "replace"), parse_constant=lambda _: None)
        return msgspec.json.decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
