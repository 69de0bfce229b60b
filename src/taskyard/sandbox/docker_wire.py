"""The streams of a container's main process: the engine's attach connection."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import aiodocker
import aiohttp
import structlog
from aiodocker.stream import Message, Stream

from taskyard.sandbox.docker_engine import Engine, EngineError
from taskyard.sandbox.provider import Reason

log = structlog.get_logger()

EXIT_S = 10.0
"""A container ends within this time after its output has, and its output after its removal."""
KILL_S = 30.0
"""How long an engine that does not answer is asked to remove a container."""
PAUSE_S = 1.0
SIGKILL_STATUS = 128 + 9


class ContainerWire:
    """See carried.Wire. Owns a container that was created, and removes it."""

    def __init__(self, engine: Engine, container: aiodocker.containers.DockerContainer) -> None:
        self._engine = engine
        self._container = container
        self._stream: Stream = container.attach(stdin=True, stdout=True, stderr=True)
        self._reading: asyncio.Future[Message | None] | None = None
        self._over = asyncio.Event()
        self._killing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Attach, and start the container. Raises EngineError; then kill() and end() are to be called."""
        async with self._engine.asked("start a container"):
            # Attached first: what it says right after its start is not lost.
            await self._stream.__aenter__()
            await self._container.start()

    async def read(self) -> tuple[int, bytes] | None:
        """See carried.Wire."""
        self._reading = asyncio.ensure_future(self._stream.read_out())
        try:
            message = await self._reading
        except asyncio.CancelledError:
            self._over.set()
            if not self._reading.cancelled() or self._killing is None:
                raise
            return None
        except (aiohttp.ClientError, OSError) as error:
            self._over.set()
            raise ConnectionError(str(error) or "the container engine broke off") from error
        if message is None:
            self._over.set()
            return None
        return message.stream, message.data

    async def write(self, data: bytes) -> None:
        """See carried.Wire."""
        try:
            await self._stream.write_in(data)
        except (AssertionError, RuntimeError, aiohttp.ClientError) as error:
            # The first two are what aiodocker has for a connection that is gone.
            raise BrokenPipeError("the container has ended") from error

    async def kill(self) -> None:
        """See carried.Wire. What an engine does not remove in KILL_S is the sweep's."""
        if self._killing is None:
            self._killing = asyncio.create_task(self._remove(), name="kill container")
        await asyncio.shield(self._killing)

    async def end(self) -> tuple[int, Reason]:
        """See carried.Wire."""
        code, oom = SIGKILL_STATUS, False
        if self._killing is None:
            with suppress(EngineError, TimeoutError):
                async with self._engine.asked("tell how a container ended"), asyncio.timeout(EXIT_S):
                    await self._container.wait()
                    state = (await self._container.show())["State"]
                    code, oom = int(state["ExitCode"]), bool(state["OOMKilled"])
        await self.kill()
        if code != SIGKILL_STATUS:
            return code, "exited"
        return code, "oom" if oom else "killed"

    async def _remove(self) -> None:
        try:
            async with asyncio.timeout(KILL_S):
                while True:
                    with suppress(EngineError):
                        await self._engine.remove_container(self._container.id)
                        break
                    await asyncio.sleep(PAUSE_S)
        except TimeoutError:
            log.warning("cannot remove a container, leaving it to the sweep", container=self._container.id)
        if self._reading is not None and not self._over.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(EXIT_S):
                    await self._over.wait()
            self._reading.cancel()
        await self._stream.close()
