"""The rules of a stream that survives cuts, without any input or output: both clients obey them.

Run-lifecycle §7.2: after the end of a connection the run is read; unless it has ended, the stream goes
on behind the last event. Errors are waited out with growing delays; some answers are final.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx

from taskyard.client import models
from taskyard.client.errors import ClientError, StreamLostError, reason, refused
from taskyard.client.models import Event, Run
from taskyard.client.sse import Parser

FINAL = frozenset({401, 403, 404, 406})
"""Answers after which trying again is of no use."""
FIRST_DELAY_S = 0.2
MAX_DELAY_S = 30.0
MAX_RETRY_AFTER_S = 3600.0
"""The longest wait that a server may ask for."""
MAX_FAILURES = 30
"""Failed tries in a row after which a stream is given up: about ten minutes."""
TIMEOUT = httpx.Timeout(30.0, connect=10.0, read=65.0)
"""A server breaks the silence every 20 s; three of those missing mean that nobody is there."""

OnRetry = Callable[[str, float], None]
"""Told why a connection ended early, and the seconds until the next try."""


class BrokenStreamError(Exception):
    """The server said inside the stream that it cannot go on."""


class Following:
    """The state of one followed stream across its connections.

    Each round: read the run; `finished`? open a connection with `headers()`; give out `events`; then
    `ended` or `failed`, and a wait of as many seconds as they say.
    """

    def __init__(self, last_event_id: str | None, max_failures: int, on_retry: OnRetry | None) -> None:
        self.last_event_id = last_event_id
        self._max_failures = max_failures
        self._on_retry = on_retry
        self._delay = FIRST_DELAY_S
        self._failures = 0
        self._parser = Parser()
        self._run_over = False
        """The run was over before the newest connection was opened."""
        self._told = False
        """The newest connection's last event was the run's end."""
        self._clean = False
        """The newest connection was closed by the server in good order."""
        self._progress = False
        """The newest connection brought an event."""

    def finished(self, run: Run) -> bool:
        """Whether everything was seen. If not, a connection is to be opened.

        A connection can end for reasons of its own, in good order too. So an ended run is not enough: the
        stream's last event told its end, or a stream of the ended run had nothing more to give.
        """
        if run.is_terminal and self._clean and (self._told or (self._run_over and not self._progress)):
            return True
        self._run_over = run.is_terminal
        self._told = self._clean = self._progress = False
        self._parser = Parser()
        return False

    def headers(self) -> dict[str, str]:
        """Headers of the next connection."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        return headers

    def events(self, chunk: bytes) -> Iterator[Event]:
        """Events in a piece of the stream. BrokenStreamError for an error frame."""
        for frame in self._parser.feed(chunk):
            if frame.event == "error":
                detail = models.event(frame.data)
                raise BrokenStreamError(str(detail.data.get("error")) if detail else "error frame")
            event = None if frame.event == "keepalive" else models.event(frame.data, frame.id)
            if event is None or event.type == "keepalive":
                continue
            self.last_event_id = frame.id or self.last_event_id
            self._delay, self._failures, self._progress = FIRST_DELAY_S, 0, True
            self._told = event.type == "task_run_state" and event.data.get("status") in models.TERMINAL
            yield event

    def ended(self) -> float:
        """Seconds to wait after the server closed the connection: none when it had something to say.

        RemoteProtocolError, for `failed`, when it had nothing but the beginning of an event.
        """
        self._clean = not self._parser.partial
        if not self._clean and not self._progress:
            raise httpx.RemoteProtocolError("closed within an event")
        return 0.0 if self._progress or self._run_over else self._next_delay()

    def failed(self, error: Exception) -> float:
        """Seconds to wait after a failed try; raises what is final."""
        if isinstance(error, ClientError) and (error.status in FINAL or 300 <= error.status < 400):
            raise error
        if isinstance(error, BrokenStreamError) and self._run_over:
            raise StreamLostError(f"the run has ended and its stream is gone: {error}") from error
        self._failures += 1
        text = reason(error)
        if self._failures > self._max_failures:
            raise StreamLostError(
                f"the stream broke {self._failures} times in a row, last: {text}"
            ) from error
        delay = self._next_delay()
        if isinstance(error, ClientError):
            delay = max(delay, min(error.retry_after_s, MAX_RETRY_AFTER_S))
        if self._on_retry is not None:
            self._on_retry(text, delay)
        return delay

    def _next_delay(self) -> float:
        delay, self._delay = self._delay, min(self._delay * 2, MAX_DELAY_S)
        return delay


def check(response: httpx.Response) -> None:
    """Raises ClientError when a stream was not opened. The body of a refusal has been read."""
    if not response.is_success:
        raise refused(response)
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise ClientError(406, "unexpected_answer", f"the answer is no event stream but {kind or 'nothing'}")


RETRIED = (httpx.TransportError, httpx.DecodingError, BrokenStreamError, ClientError)
"""What a try may fail with; `Following.failed` tells the final ones apart."""
