"""One connection of an agent to the gateway: read a request, refuse it or relay it, and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

import h11
import httpx
import structlog

from taskyard.gateway.models import (
    Admitted,
    KeyMask,
    Refused,
    admit,
    answer_headers,
    error_body,
    masked,
    provider_of,
    upstream_request,
)
from taskyard.gateway.policy import Policy, Refusal, shown_target
from taskyard.gateway.usage import Meter, ModelCall

MAX_HEAD = 64 * 1024
MAX_BODY = 64 * 1024 * 1024
IDLE_S = 300
"""A connection without a request for this long is closed."""
_CHUNK = 64 * 1024
_LINGER_S = 2
_CLIENT_GONE = 499  # as nginx calls it

_TOO_LARGE = Refused(413, f"the body exceeds {MAX_BODY} bytes.")

log = structlog.get_logger()


class _RefusedError(Exception):
    """The request turned out bad while its body was read."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.refused = refused


class Connection:
    """Serves one connection; `run()` returns when it is over. Raises OSError when the client has left."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        policy: Policy,
        client: httpx.AsyncClient,
        on_refusal: Callable[[Refusal], None],
        on_call: Callable[[ModelCall], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._policy = policy
        self._client = client
        self._on_refusal = on_refusal
        self._on_call = on_call
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._body_read = asyncio.Event()

    async def run(self) -> None:
        while (head := await self._head()) is not None:
            method, target = head.method.decode("ascii"), head.target.decode("ascii")
            decision = self._decide(head, method, target)
            if isinstance(decision, Refused):
                await self.refuse(decision, method, target)
                return
            try:
                await self._forward(head, decision)
            except _RefusedError as error:
                await self.refuse(error.refused, method, target)
                return
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                await self._linger()
                return
            self._http.start_next_cycle()

    def _decide(self, head: h11.Request, method: str, target: str) -> Admitted | Refused:
        if method == "CONNECT" or not target.startswith("/"):
            return Refused(403, "this sandbox has no access to the network, only to its model APIs.")
        if _length(head) > MAX_BODY:
            return _TOO_LARGE
        return admit(self._policy.models, method, target)

    async def _head(self) -> h11.Request | None:
        """The next request; None when there is none or it was bad, which has then been answered."""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                await self.refuse(Refused(error.error_status_hint, f"bad request: {error}"))
                return None
            if isinstance(event, h11.Request):
                # The parser's limit is for unfinished heads only.
                size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
                if size > MAX_HEAD:
                    refused = Refused(431, f"the headers exceed {MAX_HEAD} bytes.")
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
        self._on_refusal(Refusal(method, shown_target(target), refused.message, refused.status))
        headers = [(b"allow", ", ".join(refused.allow).encode())] if refused.allow else []
        headers.append((b"connection", b"close"))
        await self._error(method, target, refused.status, refused.message, headers)
        await self._linger()

    async def _error(
        self, method: str, target: str, status: int, message: str, headers: list[tuple[bytes, bytes]]
    ) -> None:
        body = error_body(provider_of(target), status, message)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *headers,
        ]
        await self._send(h11.Response(status_code=status, headers=headers))
        if method != "HEAD":
            await self._send(h11.Data(data=body))
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

    # --- relaying ---

    async def _forward(self, head: h11.Request, admitted: Admitted) -> None:
        """Relay one request and its answer; a client that leaves meanwhile ends the upstream call."""
        self._body_read.clear()
        exchange = asyncio.create_task(self._exchange(head, admitted))
        watch = asyncio.create_task(self._client_left())
        try:
            await asyncio.wait({exchange, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not exchange.done():
                raise ConnectionAbortedError
            exchange.result()
        finally:
            exchange.cancel()
            watch.cancel()
            await asyncio.gather(exchange, watch, return_exceptions=True)

    async def _client_left(self) -> None:
        """Returns at the end of the client's bytes; keeps a bounded piece of the requests that it sends ahead."""
        await self._body_read.wait()
        room = MAX_HEAD
        while data := await self._reader.read(room):
            self._http.receive_data(data)
            room -= len(data)
            if room <= 0:
                await asyncio.get_running_loop().create_future()  # until cancelled

    async def _exchange(self, head: h11.Request, admitted: Admitted) -> None:
        started, status, complete = time.monotonic(), _CLIENT_GONE, False
        meter: Meter | None = None
        try:
            answer = await self._ask(head, admitted)
            if answer is None:
                status = 502
                return
            status = answer.status_code
            meter = Meter(answer.headers.get("content-type", ""))
            async with aclosing(answer):
                complete = await self._relay(answer, admitted, meter)
        except _RefusedError as error:
            status = error.refused.status
            raise
        finally:
            if admitted.costs:
                self._report(admitted, meter, status, complete=complete, seconds=time.monotonic() - started)

    async def _ask(self, head: h11.Request, admitted: Admitted) -> httpx.Response | None:
        """Send the request on; None when the API failed, which has then been answered."""
        method = head.method.decode("ascii")
        async with aclosing(self._body()) as body:
            if not _has_body(head):
                async for _ in body:  # comes to the end of the message
                    pass
            request = upstream_request(admitted, method, head.headers, body if _has_body(head) else None)
            try:
                return await self._client.send(request, stream=True)
            except httpx.TransportError as error:
                self._log_failure(admitted, error)
                what = f"{admitted.provider} API could not be reached ({type(error).__name__})"
                message = f"the {what}; the server's log says more."
                await self._error(method, head.target.decode("ascii"), 502, message, self._farewell())
                return None

    async def _body(self) -> AsyncGenerator[bytes, None]:
        """The rest of the request, as it comes."""
        size = 0
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise _RefusedError(Refused(400, f"bad request: {error}")) from None
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                data = await self._reader.read(_CHUNK)
                if not data:
                    raise ConnectionAbortedError
                self._http.receive_data(data)
            elif isinstance(event, h11.Data):
                size += len(event.data)
                if size > MAX_BODY:
                    raise _RefusedError(_TOO_LARGE)
                yield bytes(event.data)
            else:
                self._body_read.set()
                return

    async def _relay(self, answer: httpx.Response, admitted: Admitted, meter: Meter) -> bool:
        """Pass the answer on as it comes; False when the upstream broke off."""
        key = admitted.route.api_key
        headers = answer_headers(answer.headers.raw, key) + self._farewell()
        # An error may quote the key that it did not like.
        mask = KeyMask(key if answer.status_code >= 400 else None)
        await self._send(h11.Response(status_code=answer.status_code, headers=headers))
        try:
            async for chunk in answer.aiter_raw():
                self._writer.write(self._http.send(h11.Data(data=mask.feed(chunk))) or b"")
                meter.feed(chunk)
                await self._writer.drain()
        except httpx.TransportError as error:
            self._log_failure(admitted, error)
            raise ConnectionAbortedError from None  # without the end of the message: the answer is cut
        if rest := mask.finish():
            await self._send(h11.Data(data=rest))
        await self._send(h11.EndOfMessage())
        return True

    def _farewell(self) -> list[tuple[bytes, bytes]]:
        """The header that ends the connection when the answer comes before the request was read to its end."""
        return [] if self._http.their_state is h11.DONE else [(b"connection", b"close")]

    def _report(
        self, admitted: Admitted, meter: Meter | None, status: int, *, complete: bool, seconds: float
    ) -> None:
        meter = meter or Meter("")
        meter.finish()
        self._on_call(
            ModelCall(
                provider=admitted.provider,
                endpoint=admitted.endpoint,
                model=meter.model,
                status=status,
                complete=complete,
                metered=meter.metered,
                seconds=seconds,
                input_tokens=meter.input_tokens,
                output_tokens=meter.output_tokens,
                cached_read_tokens=meter.cached_read_tokens,
                cached_write_tokens=meter.cached_write_tokens,
            )
        )

    def _log_failure(self, admitted: Admitted, error: httpx.TransportError) -> None:
        # What could not be sent may be quoted in the text, and so the key; connection errors quote nothing.
        text = "" if isinstance(error, httpx.LocalProtocolError) else str(error)
        key = admitted.route.api_key
        log.warning(
            "model_api_failed",
            run_id=self._policy.run_id,
            provider=admitted.provider,
            upstream=admitted.route.base_url,
            error=type(error).__name__,
            detail=masked(text.encode("utf-8", "replace"), key).decode("utf-8", "replace"),
        )


def _length(head: h11.Request) -> int:
    """The declared length of the body; 0 when none is declared."""
    return max((int(value) for name, value in head.headers if name == b"content-length"), default=0)


def _has_body(head: h11.Request) -> bool:
    return _length(head) > 0 or any(name == b"transfer-encoding" for name, _ in head.headers)
