"""What carries bytes is tested on asyncio's own event loop and on the one of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

ON_BOTH = {"test_upstream.py", "test_relay.py", "test_egress.py"}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.path.name in ON_BOTH:
        factories["asyncio"] = asyncio.new_event_loop
    return factories
