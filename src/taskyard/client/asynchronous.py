"""The asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from taskyard.client import models, requests
from taskyard.client.errors import refused, unreachable
from taskyard.client.following import MAX_FAILURES, RETRIED, TIMEOUT, Following, OnRetry, check
from taskyard.client.models import Event, Json, Repository, Run, Task
from taskyard.client.requests import Call, Endpoint, T
from taskyard.client.sse import Lines


class AsyncTaskyard:
    """`Taskyard` with coroutines and asynchronous iterators; everything else said there holds here."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        project: int | str = "@current",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.endpoint = Endpoint.of(url, api_key, project)
        try:
            self._http = httpx.AsyncClient(**self.endpoint.options(), transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise unreachable(self.endpoint.url, error) from error

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def create_task(
        self,
        *,
        title: str = "",
        description: str = "",
        repository: str | None = None,
        json_schema: Json | None = None,
        **fields: Any,
    ) -> Task:
        """A new task; nothing runs yet. Further `fields` are sent as they are (tasks-api §4.2)."""
        return await self._call(requests.create_task(title, description, repository, json_schema, fields))

    async def get_task(self, task_id: str) -> Task:
        return await self._call(requests.get_task(task_id))

    async def list_tasks(self, **filters: Any) -> AsyncIterator[Task]:
        """Tasks, newest first, page by page. Filters of tasks-api §4.1, such as `status` or `search`."""
        offset = 0
        while True:
            page = await self._call(requests.list_tasks(offset, filters))
            for task in page.results:
                yield task
            offset += len(page.results)
            if page.next is None or not page.results:
                return

    async def run_task(self, task_id: str, **options: Any) -> Task:
        """Start a run; it is `latest_run` of the answer. Options of tasks-api §4.8; None means not sent."""
        return await self._call(requests.run_task(task_id, options))

    async def get_run(self, task_id: str, run_id: str) -> Run:
        return await self._call(requests.get_run(task_id, run_id))

    async def update_run(self, task_id: str, run_id: str, **fields: Any) -> Run:
        """Change a run (tasks-api §5.4). None is sent as null."""
        return await self._call(requests.update_run(task_id, run_id, fields))

    async def cancel(self, task_id: str, run_id: str) -> Run:
        """End a run as cancelled. To interrupt only the agent's turn: `command(…, "cancel")`."""
        return await self.update_run(task_id, run_id, status="cancelled")

    async def command(self, task_id: str, run_id: str, method: str, **params: Any) -> Json:
        """Tell the agent something (tasks-api §6.6); the result of its JSON-RPC answer."""
        return requests.command_result(await self._call(requests.command(task_id, run_id, method, params)))

    async def user_message(
        self, task_id: str, run_id: str, content: str | None = None, *, artifact_ids: Sequence[str] = ()
    ) -> Json:
        """Send a message to the agent of a live run: `{"queued": true}`, or the end of the turn."""
        return await self.command(
            task_id, run_id, "user_message", **requests.message_params(content, artifact_ids)
        )

    async def register_repository(self, origin: str, name: str | None = None) -> Repository:
        """Give a git URL, or a path on the server, the `org/repo` name that tasks use."""
        return await self._call(requests.register_repository(origin, name))

    async def logs(self, task_id: str, run_id: str) -> AsyncIterator[Event]:
        """The log of a run and of those it resumed, oldest first, read as it arrives."""
        lines = Lines()
        async with self._open(requests.run_path(task_id, run_id, "logs/")) as response:
            if not response.is_success:
                await response.aread()
                raise refused(response)
            async for chunk in response.aiter_bytes():
                for event in filter(None, map(models.event, lines.feed(chunk))):
                    yield event
        if (last := models.event(lines.rest())) is not None:
            yield last

    async def stream(
        self,
        task_id: str,
        run_id: str,
        last_event_id: str | None = None,
        *,
        max_failures: int = MAX_FAILURES,
        on_retry: OnRetry | None = None,
    ) -> AsyncIterator[Event]:
        """The events of a run from the beginning, or behind `last_event_id`, until the run has ended.

        Survives cut connections and a restart of the server: nothing is lost or repeated. StreamLostError
        after `max_failures` failed tries in a row.
        """
        following = Following(last_event_id, max_failures, on_retry)
        path = requests.run_path(task_id, run_id, "stream/")
        while True:
            try:
                if following.finished(await self.get_run(task_id, run_id)):
                    return
                async with self._http.stream(
                    "GET", path, headers=following.headers(), timeout=TIMEOUT
                ) as response:
                    if not response.is_success:
                        await response.aread()
                    check(response)
                    async for chunk in response.aiter_bytes():
                        for event in following.events(chunk):
                            yield event
                delay = following.ended()
            except RETRIED as error:
                delay = following.failed(error)
            await asyncio.sleep(delay)

    async def _call(self, call: Call[T]) -> T:
        try:
            response = await self._http.request(
                call.method, call.path, json=call.body, params=dict(call.query), timeout=call.timeout
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self.endpoint.url, error) from error
        return call.decode(response)

    @asynccontextmanager
    async def _open(self, path: str) -> AsyncIterator[httpx.Response]:
        try:
            async with self._http.stream("GET", path) as response:
                yield response
        except httpx.HTTPError as error:
            raise unreachable(self.endpoint.url, error) from error
