"""The first prompt and its blocks (run-lifecycle §6.4)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from taskyard.drive.prompt import (
    BLOCKS,
    content_blocks,
    continuation,
    first_prompt,
    pending_artifacts,
    with_history,
)


@pytest.mark.parametrize(
    ("state", "description", "prompt"),
    [
        ({"pending_user_message": "p", "initial_prompt_override": "o"}, "d", "p"),
        ({"pending_user_message": " ", "initial_prompt_override": "o"}, "d", "o"),
        ({}, "d", "d"),
        ({"pending_user_message": 7}, " ", ""),
    ],
)
def test_first_prompt(state: dict[str, Any], description: str, prompt: str) -> None:
    assert first_prompt(state, description) == prompt


def test_work_that_was_begun_is_not_begun_again() -> None:
    assert first_prompt({"initial_prompt_override": "o"}, "d", begun=True) == ""
    assert first_prompt({"pending_user_message": "p"}, "d", begun=True) == "p"


def test_pending_artifacts() -> None:
    manifest = [{"id": "a"}, {"id": "b"}, {"name": "without an id"}]
    assert pending_artifacts({"pending_user_artifact_ids": ["b", "x", None, [], "a"]}, manifest) == [
        {"id": "b"},
        {"id": "a"},
    ]
    for nothing in ({}, {"pending_user_artifact_ids": None}, {"pending_user_artifact_ids": "a"}):
        assert pending_artifacts(nothing, manifest) == []


def test_text_is_one_block() -> None:
    assert content_blocks("hello") == [{"type": "text", "text": "hello"}]


def test_blocks_pass_through() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "image", "data": "x"}]
    assert content_blocks(BLOCKS + json.dumps({"blocks": blocks})) == blocks


@pytest.mark.parametrize("rest", ["", "{", "[]", '{"blocks": []}', '{"blocks": "x"}', '{"blocks": [1]}'])
def test_broken_blocks_are_text(rest: str) -> None:
    assert content_blocks(BLOCKS + rest) == [{"type": "text", "text": BLOCKS + rest}]


def test_an_interrupted_message_comes_again_as_it_was() -> None:
    """A text is quoted, since its work has begun; blocks stay blocks, so that a picture is one."""
    [told] = continuation("Do this\nand that")
    assert told["text"].endswith("The message was:\n\n    Do this\n    and that")
    blocks = [{"type": "text", "text": "a"}, {"type": "image", "data": "x"}]
    [told, *rest] = continuation(BLOCKS + json.dumps({"blocks": blocks}))
    assert told["text"].endswith("The message follows.")
    assert rest == blocks


def test_history_goes_before() -> None:
    before, *rest = with_history("User: one\nYou: two", [{"type": "image", "data": "x"}])
    assert "\n\n    User: one\n    You: two\n\nWhat follows is new." in before["text"]
    assert rest == [{"type": "image", "data": "x"}]
