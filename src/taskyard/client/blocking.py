"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from taskyard.client import models, requests
from taskyard.client.errors import refused, unreachable
from taskyard.client.following import MAX_FAILURES, RETRIED, TIMEOUT, Following, OnRetry, check
from taskyard.client.models import Event, Json, Repository, Run, Task
from taskyard.client.requests import Call, Endpoint, T
from taskyard.client.sse import Lines


class Taskyard:
    """A server, seen from one project.

    `url` and `api_key` default to TASKYARD_URL and TASKYARD_API_KEY; `project` is an id, or "@current" for
    the key's own. Every method raises ClientError for an answer that is not a success, UnreachableError
    when there is none. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        project: int | str = "@current",
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.endpoint = Endpoint.of(url, api_key, project)
        try:
            self._http = httpx.Client(**self.endpoint.options(), transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise unreachable(self.endpoint.url, error) from error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def create_task(
        self,
        *,
        title: str = "",
        description: str = "",
        repository: str | None = None,
        json_schema: Json | None = None,
        **fields: Any,
    ) -> Task:
        """A new task; nothing runs yet. Further `fields` are sent as they are (tasks-api §4.2)."""
        return self._call(requests.create_task(title, description, repository, json_schema, fields))

    def get_task(self, task_id: str) -> Task:
        return self._call(requests.get_task(task_id))

    def list_tasks(self, **filters: Any) -> Iterator[Task]:
        """Tasks, newest first, page by page. Filters of tasks-api §4.1, such as `status` or `search`."""
        offset = 0
        while True:
            page = self._call(requests.list_tasks(offset, filters))
            yield from page.results
            offset += len(page.results)
            if page.next is None or not page.results:
                return

    def run_task(self, task_id: str, **options: Any) -> Task:
        """Start a run; it is `latest_run` of the answer. Options of tasks-api §4.8; None means not sent."""
        return self._call(requests.run_task(task_id, options))

    def get_run(self, task_id: str, run_id: str) -> Run:
        return self._call(requests.get_run(task_id, run_id))

    def update_run(self, task_id: str, run_id: str, **fields: Any) -> Run:
        """Change a run (tasks-api §5.4). None is sent as null."""
        return self._call(requests.update_run(task_id, run_id, fields))

    def cancel(self, task_id: str, run_id: str) -> Run:
        """End a run as cancelled. To interrupt only the agent's turn: `command(…, "cancel")`."""
        return self.update_run(task_id, run_id, status="cancelled")

    def command(self, task_id: str, run_id: str, method: str, **params: Any) -> Json:
        """Tell the agent something (tasks-api §6.6); the result of its JSON-RPC answer."""
        return requests.command_result(self._call(requests.command(task_id, run_id, method, params)))

    def user_message(
        self, task_id: str, run_id: str, content: str | None = None, *, artifact_ids: Sequence[str] = ()
    ) -> Json:
        """Send a message to the agent of a live run: `{"queued": true}`, or the end of the turn."""
        return self.command(task_id, run_id, "user_message", **requests.message_params(content, artifact_ids))

    def register_repository(self, origin: str, name: str | None = None) -> Repository:
        """Give a git URL, or a path on the server, the `org/repo` name that tasks use."""
        return self._call(requests.register_repository(origin, name))

    def logs(self, task_id: str, run_id: str) -> Iterator[Event]:
        """The log of a run and of those it resumed, oldest first, read as it arrives."""
        lines = Lines()
        with self._open(requests.run_path(task_id, run_id, "logs/")) as response:
            if not response.is_success:
                response.read()
                raise refused(response)
            for chunk in response.iter_bytes():
                yield from filter(None, map(models.event, lines.feed(chunk)))
        if (last := models.event(lines.rest())) is not None:
            yield last

    def stream(
        self,
        task_id: str,
        run_id: str,
        last_event_id: str | None = None,
        *,
        max_failures: int = MAX_FAILURES,
        on_retry: OnRetry | None = None,
    ) -> Iterator[Event]:
        """The events of a run from the beginning, or behind `last_event_id`, until the run has ended.

        Survives cut connections and a restart of the server: nothing is lost or repeated. StreamLostError
        after `max_failures` failed tries in a row.
        """
        following = Following(last_event_id, max_failures, on_retry)
        path = requests.run_path(task_id, run_id, "stream/")
        while True:
            try:
                if following.finished(self.get_run(task_id, run_id)):
                    return
                with self._http.stream("GET", path, headers=following.headers(), timeout=TIMEOUT) as response:
                    if not response.is_success:
                        response.read()
                    check(response)
                    for chunk in response.iter_bytes():
                        yield from following.events(chunk)
                delay = following.ended()
            except RETRIED as error:
                delay = following.failed(error)
            time.sleep(delay)

    def _call(self, call: Call[T]) -> T:
        try:
            response = self._http.request(
                call.method, call.path, json=call.body, params=dict(call.query), timeout=call.timeout
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self.endpoint.url, error) from error
        return call.decode(response)

    @contextmanager
    def _open(self, path: str) -> Iterator[httpx.Response]:
        try:
            with self._http.stream("GET", path) as response:
                yield response
        except httpx.HTTPError as error:
            raise unreachable(self.endpoint.url, error) from error
