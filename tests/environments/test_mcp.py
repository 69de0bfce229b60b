"""Tool servers of an environment: how they are sent, kept, shown, and given to an agent."""

from __future__ import annotations

from typing import Any

import pytest

from taskyard.environments.mcp import UnknownVariableError, for_agent
from tests.support.yard import Json, Yard, error, ok

STDIO = {"name": "shelf", "type": "stdio", "command": "shelf", "args": ["--x "], "env": {"A": "${KEY}"}}
HTTP = {"name": "far", "type": "http", "url": "https://mcp.example/x", "headers": {"X-Key": "k ${KEY}"}}


async def test_kept_and_shown(yard: Yard) -> None:
    sent = {"name": "Tools", "setup_script": "  true\n", "mcp_servers": [STDIO, HTTP]}
    made = ok(await yard.api().post("sandbox_environments/", sent), 201)
    assert (made["mcp_servers"], made["setup_script"]) == ([STDIO, HTTP], "  true\n")
    path = f"sandbox_environments/{made['id']}/"
    changed = ok(await yard.api().patch(path, {"mcp_servers": [{"name": "a", "command": "b"}]}))
    assert changed["mcp_servers"] == [{"name": "a", "type": "stdio", "command": "b", "args": [], "env": {}}]
    assert changed["setup_script"] == "  true\n"
    assert ok(await yard.api().patch(path, {"mcp_servers": [], "setup_script": ""}))["mcp_servers"] == []
    [item] = ok(await yard.api().get("sandbox_environments/"))["results"]
    assert "mcp_servers" not in item


@pytest.mark.parametrize(
    ("servers", "attr"),
    [
        ([{"command": "x"}], "mcp_servers__0__name"),
        ([{"name": "a b", "command": "x"}], "mcp_servers__0__name"),
        ([{"name": "a"}], "mcp_servers__0"),
        ([{"name": "a", "type": "http"}], "mcp_servers__0"),
        ([{"name": "a", "type": "sse", "url": "ftp://x"}], "mcp_servers__0"),
        ([{"name": "a", "type": "http", "url": "http://[x"}], "mcp_servers__0"),
        ([{"name": "a", "type": "pipe"}], "mcp_servers__0__type"),
        ([{"name": "a", "command": "x"}] * 2, "mcp_servers"),
        ([{"name": "taskyard", "command": "x"}], "mcp_servers"),
        ("x", "mcp_servers"),
        (None, "mcp_servers"),
    ],
)
async def test_refused(yard: Yard, servers: Any, attr: str) -> None:
    answer = await yard.api().post("sandbox_environments/", {"name": "e", "mcp_servers": servers})
    assert answer.status_code == 400, answer.text
    assert answer.json()["attr"] == attr


async def test_a_script_that_cannot_be(yard: Yard) -> None:
    answer = await yard.api().post("sandbox_environments/", {"name": "e", "setup_script": "a\0b"})
    assert answer.status_code == 400
    assert answer.json()["attr"] == "setup_script"
    answer = await yard.api().post("sandbox_environments/", {"name": "e", "setup_script": "x" * 64_001})
    error(answer, 400, answer.json()["code"], "setup_script")


def test_in_words_of_the_protocol() -> None:
    servers: list[Json] = [STDIO, HTTP]
    assert for_agent(servers, {"KEY": "$${KEY}"}) == [
        {
            "name": "shelf",
            "command": "shelf",
            "args": ["--x "],
            "env": [{"name": "A", "value": "$${KEY}"}],
        },
        {
            "type": "http",
            "name": "far",
            "url": "https://mcp.example/x",
            "headers": [{"name": "X-Key", "value": "k $${KEY}"}],
        },
    ]
    with pytest.raises(UnknownVariableError, match="'shelf' refers to"):
        for_agent(servers, {})
