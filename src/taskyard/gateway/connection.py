"""One connection of an agent to the gateway: read a request, refuse it, relay it or open a tunnel, and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, field

import h11
import structlog

from taskyard.gateway import egress, git, mcp
from taskyard.gateway.batch import Batch
from taskyard.gateway.calls import CLIENT_GONE, CallExchange, check_budget, refusal_body
from taskyard.gateway.egress import Destination, PlainExchange, Traffic
from taskyard.gateway.exchange import Answer, Exchange, RefusedError, has_body, length
from taskyard.gateway.models import Refused, admit, provider_of
from taskyard.gateway.policy import Policy, Refusal, shown_target
from taskyard.gateway.upstream import Upstream, UpstreamResponse
from taskyard.gateway.usage import ModelCall
from taskyard.gateway.wire import UpstreamError

MAX_HEAD = 64 * 1024
IDLE_S = 300
"""A connection without a request for this long is closed."""
MAX_LOOKUPS = 4
"""Names that a run looks up at once: names whose server never answers must not fill the resolvers of all runs."""
MAX_FIELDS = 256
_LONG_HEAD = 4096
_CHUNK = 64 * 1024
_LINGER_S = 2
_BREATH = 64
"""So many pieces in a row and others get their turn: pieces of one byte cost as much as large ones."""
_TOLD = 500
"""Characters of what is told of a refusal, for each of its parts: an agent writes them."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Side:
    """What the connections of one run share."""

    policy: Policy
    upstream: Upstream
    traffic: Traffic
    on_refusal: Callable[[Refusal], None]
    on_call: Callable[[ModelCall], None]
    lookups: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_LOOKUPS))
    long_heads: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Many fields take long to read: one head after the other, and others between them."""
    calls: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(mcp.AT_ONCE))


class Connection:
    """Serves one connection; `run()` returns when it is over. Raises OSError when the client has left."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, side: Side) -> None:
        self._reader = reader
        self._writer = writer
        self._side = side
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._body_read = asyncio.Event()
        self._within: Destination | None = None
        """The tunnel that is read as HTTP."""

    async def run(self) -> None:
        while (head := await self._head()) is not None:
            method, target = head.method.decode("ascii"), head.target.decode("ascii")
            try:
                decision = await self._decide(head, method, target)
                if isinstance(decision, Destination):
                    # Port 80 is for HTTP, and the header Host could name any other site of the same content network.
                    if self._side.policy.network.level == "listed" and decision.port == 80:
                        await self._enter(decision)
                        continue
                    await self._tunnel(decision, method, target)
                    return
                if isinstance(decision, Exchange):
                    await self._forward(head, decision)
                else:
                    raise RefusedError(decision)  # noqa: TRY301 - one way for all refusals
            except RefusedError as error:
                await self.refuse(error.refused, method, target)
                return
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                await self._linger()
                return
            self._http.start_next_cycle()

    async def _decide(self, head: h11.Request, method: str, target: str) -> Exchange | Destination | Refused:
        side, policy = self._side, self._side.policy
        decision: Exchange | Refused
        if method != method.upper():
            # Methods are case-sensitive, and what one server takes for another method the next one does not.
            return Refused(400, "methods are written in capital letters.")
        if self._within is not None:
            if spent := side.traffic.exceeded:
                return Refused(403, spent)
            if method == "CONNECT" or not target.startswith("/"):
                return Refused(400, "a tunnel to port 80 takes requests for paths of its host.")
            return PlainExchange(self._within, target, side.traffic)
        if method == "CONNECT" or not target.startswith("/"):
            if spent := side.traffic.exceeded:
                return Refused(403, spent)
            if method == "CONNECT":
                return await egress.tunnel_to(policy.network, target, side.lookups)
            found = await egress.plain_to(policy.network, target, side.lookups)
            if isinstance(found, Refused):
                return found
            decision = PlainExchange(*found, side.traffic)
        elif target.startswith(git.PREFIX):
            asked = git.admit(policy.git, method, target)
            if isinstance(asked, git.Elsewhere):
                return git.GitRedirect(asked)
            decision = asked if isinstance(asked, Refused) else git.GitExchange(asked)
        elif target.partition("?")[0] == mcp.PATH:
            decision = mcp.admit(policy.tools, side.calls)
        else:
            admitted = admit(policy.models, method, target)
            if isinstance(admitted, Refused):
                return admitted
            spent_up = check_budget(policy) if admitted.costs else None
            if length(head) > CallExchange.max_body:
                return _too_large(CallExchange.max_body)
            decision = spent_up or CallExchange(admitted, policy, side.on_call)
        if (
            isinstance(decision, Exchange)
            and decision.max_body is not None
            and length(head) > decision.max_body
        ):
            return _too_large(decision.max_body)
        return decision

    async def _head(self) -> h11.Request | None:
        """The next request; None when there is none or it was bad, which has then been answered."""
        while True:
            try:
                if len(self._http.trailing_data[0]) < _LONG_HEAD:
                    event = self._http.next_event()
                else:
                    async with self._side.long_heads:
                        await asyncio.sleep(0)
                        event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                await self.refuse(Refused(error.error_status_hint, f"bad request: {error}"))
                return None
            if isinstance(event, h11.Request):
                # The parser's limit is for unfinished heads only.
                size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
                if size > MAX_HEAD or len(event.headers) > MAX_FIELDS:
                    refused = Refused(431, f"the headers exceed {MAX_HEAD} bytes, or {MAX_FIELDS} fields.")
                    await self.refuse(refused, event.method.decode("ascii"), event.target.decode("ascii"))
                    return None
                return event
            if event is not h11.NEED_DATA:
                return None
            try:
                async with asyncio.timeout(IDLE_S):
                    data = await self._reader.read(_CHUNK)
            except TimeoutError:
                return None
            if not data:
                return None
            self._http.receive_data(data)

    async def refuse(self, refused: Refused, method: str = "", target: str = "") -> None:
        """Answer with an error, tell `on_refusal`, and end the connection."""
        self._tell(refused, method, target)
        headers = [(b"allow", ", ".join(refused.allow).encode())] if refused.allow else []
        headers.append((b"connection", b"close"))
        await self._answer(method, _error(target, refused), headers)
        await self._linger()

    def _tell(self, refused: Refused, method: str, target: str) -> None:
        told = Refusal(
            method[:_TOLD], shown_target(target), refused.message[:_TOLD], refused.status, refused.rule
        )
        self._side.on_refusal(told)

    async def _answer(self, method: str, answer: Answer, headers: list[tuple[bytes, bytes]]) -> None:
        headers = [
            (b"content-type", answer.content_type.encode("ascii")),
            (b"content-length", str(len(answer.body)).encode()),
            *answer.headers,
            *headers,
        ]
        await self._send(h11.Response(status_code=answer.status, headers=headers))
        if method != "HEAD":
            await self._send(h11.Data(data=answer.body))
        await self._send(h11.EndOfMessage())

    async def _linger(self) -> None:
        """Let the client read the answer: closing while its bytes are unread would reset the connection."""
        with suppress(TimeoutError):
            if self._writer.can_write_eof():
                self._writer.write_eof()
            async with asyncio.timeout(_LINGER_S):
                while await self._reader.read(_CHUNK):
                    pass

    async def _send(self, event: h11.Event) -> None:
        if data := self._http.send(event):
            self._writer.write(data)
            await self._writer.drain()

    # --- tunnels ---

    async def _enter(self, destination: Destination) -> None:
        """Open a tunnel whose requests are read, and relayed one by one."""
        await self._send(h11.Response(status_code=200, headers=[], reason=b"Connection established"))
        first = self._http.trailing_data[0]
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._within = destination
        if first:
            self._http.receive_data(first)

    async def _tunnel(self, destination: Destination, method: str, target: str) -> None:
        outside = await egress.open_tunnel(destination)
        if isinstance(outside, Refused):
            await self.refuse(outside, method, target)
            return
        try:
            await self._send(h11.Response(status_code=200, headers=[], reason=b"Connection established"))
            first = self._http.trailing_data[0]
            if self._side.policy.network.level == "listed" and destination.port == 443:
                inside = (self._reader, self._writer)
                first, problem = await egress.check_hellos(
                    inside, outside, first, destination, self._side.traffic
                )
                if problem is not None:
                    self._tell(Refused(403, f"{destination.host.bracketed}: {problem}."), method, target)
                    outside[1].close()
                    await egress.refuse_hello(self._writer)
                    await self._linger()
                    return
            await egress.pump((self._reader, self._writer), outside, first, self._side.traffic)
        except BaseException:
            outside[1].transport.abort()
            raise
        outside[1].close()

    # --- relaying ---

    async def _forward(self, head: h11.Request, exchange: Exchange) -> None:
        """Relay one request and its answer; a client that leaves meanwhile ends the upstream call."""
        self._body_read.clear()
        relaying = asyncio.create_task(self._exchange(head, exchange))
        watch = asyncio.create_task(self._client_left())
        try:
            await asyncio.wait({relaying, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not relaying.done():
                raise ConnectionAbortedError
            relaying.result()
        finally:
            relaying.cancel()
            watch.cancel()
            await asyncio.gather(relaying, watch, return_exceptions=True)

    async def _client_left(self) -> None:
        """Returns at the end of the client's bytes; keeps a bounded piece of the requests that it sends ahead."""
        await self._body_read.wait()
        # What was sent ahead with an earlier request is still there.
        room = MAX_HEAD - len(self._http.trailing_data[0])
        while room > 0:
            data = await self._reader.read(room)
            if not data:
                return
            self._http.receive_data(data)
            room -= len(data)
        await asyncio.get_running_loop().create_future()  # until cancelled

    async def _exchange(self, head: h11.Request, exchange: Exchange) -> None:
        started, status, complete = time.monotonic(), CLIENT_GONE, False
        method, target = head.method.decode("ascii"), head.target.decode("ascii")
        try:
            answer = await self._ask(head, exchange)
            if isinstance(answer, Answer):
                status = answer.status
                if answer.refused is not None:
                    self._tell(answer.refused, method, target)
                await self._answer(method, answer, self._farewell())
                return
            with closing(answer):
                headers = exchange.head(answer)
                if isinstance(headers, Answer):
                    status = headers.status
                    await self._answer(method, headers, self._farewell())
                    return
                status = answer.status
                complete = await self._relay(answer, headers, exchange)
        except RefusedError as error:
            status = error.refused.status
            raise
        finally:
            exchange.ended(status, complete=complete, seconds=time.monotonic() - started)

    async def _ask(self, head: h11.Request, exchange: Exchange) -> UpstreamResponse | Answer:
        """Send the request on; an answer of our own when it is not sent, or the other side failed."""
        async with aclosing(self._body(exchange.max_body)) as body:
            if not has_body(head):
                async for _ in body:  # comes to the end of the message
                    pass
            request = await exchange.request(head, body if has_body(head) else None)
            if isinstance(request, Answer):
                return request
            try:
                return await self._side.upstream.send(request)
            except UpstreamError as error:
                self._log_failure(exchange, error)
                what = f"{exchange.name} could not be reached ({type(error).__name__})"
                return _error(
                    head.target.decode("ascii"), Refused(502, f"{what}; the server's log says more.")
                )

    async def _body(self, limit: int | None) -> AsyncGenerator[bytes, None]:
        """The rest of the request, as it comes."""
        size = count = 0
        while True:
            count += 1
            if count % _BREATH == 0:
                await asyncio.sleep(0)
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise RefusedError(Refused(400, f"bad request: {error}")) from None
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                try:
                    async with asyncio.timeout(IDLE_S):
                        data = await self._reader.read(_CHUNK)
                except TimeoutError:
                    raise ConnectionAbortedError from None
                if not data:
                    raise ConnectionAbortedError
                self._http.receive_data(data)
            elif isinstance(event, h11.Data):
                size += len(event.data)
                if limit is not None and size > limit:
                    raise RefusedError(_too_large(limit))
                yield bytes(event.data)
            else:
                self._body_read.set()
                return

    async def _relay(
        self, answer: UpstreamResponse, headers: list[tuple[bytes, bytes]], exchange: Exchange
    ) -> bool:
        """Pass the answer on as it comes; False when it was stopped before its end."""
        batch = Batch(self._writer.transport)

        async def send(event: h11.Event) -> None:
            batch.write(self._http.send(event) or b"")
            await self._writer.drain()

        try:
            await send(h11.Response(status_code=answer.status, headers=headers + self._farewell()))
            count = 0
            async for chunk in answer:
                count += 1
                if count % _BREATH == 0:
                    await asyncio.sleep(0)
                await send(h11.Data(data=exchange.feed(chunk)))
                if exchange.stopped:
                    break
            if rest := exchange.finish():
                await send(h11.Data(data=rest))
            await send(h11.EndOfMessage())
        except UpstreamError as error:
            self._log_failure(exchange, error)
            raise ConnectionAbortedError from None  # without the end of the message: the answer is cut
        finally:
            batch.flush()
        return not exchange.stopped

    def _farewell(self) -> list[tuple[bytes, bytes]]:
        """The header that ends the connection when the answer comes before the request was read to its end."""
        return [] if self._http.their_state is h11.DONE else [(b"connection", b"close")]

    def _log_failure(self, exchange: Exchange, error: UpstreamError) -> None:
        log.warning(
            "gateway_upstream_failed",
            run_id=self._side.policy.run_id,
            upstream=exchange.upstream,
            error=type(error).__name__,
            detail=exchange.masked(str(error)),
        )


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body exceeds {limit} bytes.")


def _error(target: str, refused: Refused) -> Answer:
    """An error in the words of whoever asked."""
    if target.startswith(git.PREFIX):
        return git.text_answer(refused.status, refused.message)
    return Answer(refused.status, refusal_body(provider_of(target), refused), "application/json")
