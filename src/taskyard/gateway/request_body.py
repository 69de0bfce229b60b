"""What the body of a model call asks for: the models that may answer it, and an answer that comes later.

An upstream finds the model of a call in one field, and further ones in others: a tool that asks another model
(`advisor` of Anthropic, OpenRouter and others), a list to fall back on (LiteLLM, OpenRouter). Whoever limits models
or money has to know them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

Fields = Mapping[str, msgspec.Raw]

MAX_FIELDS = 1000
"""Of the object that a request is: more are no call, and cost memory a hundred times their size."""
MAX_TOOLS = 10_000
MAX_TOOL_FIELDS = 50
MAX_SEARCHED = 1024 * 1024
"""Bytes of a request in which further models are looked for: more hold up other runs, and no agent sends as many."""
CONTENT = {
    "model", "messages", "input", "system", "instructions", "prompt", "metadata", "tools",
    "text", "response_format", "output_format", "output_config",
}  # fmt: skip
"""Fields that hold what is said, or schemas of it: a `model` in there names none. Tools are looked at one by one."""
FALLBACKS = {"models", "fallbacks", "context_window_fallbacks", "content_policy_fallbacks"}
"""Fields of routers that name further models, each in a form of its own."""
FUNCTIONS = {None, "function", "custom"}
"""Types of tools that the agent runs itself."""


class _Name:
    """The name of a field. Its type keeps the parser from making an object of a million."""

    def __init__(self, text: str) -> None:
        self.text = text


def fields_of(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a request, and so the body to send on. Raises ValueError; the text says why.

    A field that stands there twice means one thing to one parser and another to the next. So what goes on is what was
    read here: the last one of each name, written once.
    """
    return dict(_pairs(body, MAX_FIELDS))


def _pairs(body: bytes, limit: int) -> list[tuple[str, msgspec.Raw]]:
    """All fields of an object. Raises ValueError when there are more than `limit`, and for anything else."""
    count = 0

    def name(_: type, text: str) -> _Name:
        nonlocal count
        count += 1
        if count > limit:
            raise ValueError
        return _Name(text)

    try:
        read = msgspec.json.decode(body, type=dict[_Name, msgspec.Raw], dec_hook=name)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        many = f"has more than {limit} fields" if count > limit else "is no JSON object"
        raise ValueError(many) from None
    return [(name.text, value) for name, value in read.items()]


def models_of(fields: Fields) -> list[str]:
    """The models that a request names: the one of its field `model`, then others. Raises ValueError; the text says why.

    Names of fields are taken in any case.
    """
    if [name for name in fields if name.casefold() == "model"] != ["model"]:
        raise ValueError("does not name its model, or names several")
    found = [_text(fields["model"])]
    search = _Search()
    for name, value in fields.items():
        field = name.casefold()
        if field in FALLBACKS and bytes(value) not in (b"null", b"[]", b"{}"):
            raise ValueError(f"has '{name}', which may name further models: leave it out")
        if field == "tools":
            found += _of_tools(value, search)
        elif field not in CONTENT:
            found += search.within(value)
    return found


def in_background(fields: Fields) -> bool:
    """Whether an answer is asked for that comes later, by a request of its own."""
    asked = [bytes(value) for name, value in fields.items() if name.casefold() == "background"]
    return any(value not in (b"false", b"null") for value in asked)


def _text(value: msgspec.Raw) -> str:
    try:
        return msgspec.json.decode(value, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ValueError("names a model that is no text") from None


def _of_tools(value: msgspec.Raw, search: _Search) -> Iterator[str]:
    """What tools name that run at the vendor. The arguments of others may be called `model`, too."""
    if not _may_name(value):
        return
    try:
        tools = msgspec.json.decode(value, type=list[msgspec.Raw] | None) or []
        if len(tools) > MAX_TOOLS:
            raise ValueError(f"has more than {MAX_TOOLS} tools")
        for tool in tools:
            if not _may_name(tool):
                continue
            fields = _of_tool(bytes(tool))
            kinds = [name for name in fields if name.casefold() == "type"]
            kind = msgspec.json.decode(fields["type"], type=str | None) if kinds == ["type"] else None
            own = kind in FUNCTIONS and kinds in ([], ["type"])
            for name, part in fields.items():
                if name.casefold() == "model":
                    yield _text(part)
                elif not own:
                    yield from search.within(part)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ValueError("has tools that cannot be read") from None


def _of_tool(tool: bytes) -> dict[str, msgspec.Raw]:
    """Its fields. It goes on as it is, so none may stand there twice."""
    try:
        pairs = _pairs(tool, MAX_TOOL_FIELDS)
    except ValueError as error:
        raise ValueError(f"has a tool that {error}") from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("has a tool with a field that stands there twice")
    return fields


class _Search:
    """Looks for further models in one request."""

    def __init__(self) -> None:
        self._left = MAX_SEARCHED

    def within(self, value: msgspec.Raw) -> Iterator[str]:
        """Everything called `model` in a value, however often it stands there."""
        if not _may_name(value):
            return
        text = bytes(value)
        self._left -= len(text)
        if self._left < 0:
            raise ValueError(f"has more than {MAX_SEARCHED} bytes in fields that may name further models")
        try:
            waiting: list[Any] = [json.loads(text, object_pairs_hook=_Pairs)]
        except (ValueError, RecursionError):
            raise ValueError("has a field that cannot be read") from None
        while waiting:
            match waiting.pop():
                case _Pairs() as pairs:
                    for name, inner in pairs:
                        if isinstance(inner, str) and name.casefold() == "model":
                            yield inner
                        elif not isinstance(inner, str):
                            waiting.append(inner)
                case list() as items:
                    waiting += [item for item in items if not isinstance(item, str)]
                case _:
                    pass


class _Pairs(tuple[tuple[str, Any], ...]):
    """An object with every field that stands there; `json` gives them as pairs."""

    __slots__ = ()


def _may_name(value: msgspec.Raw) -> bool:
    """Whether a name in there may be `model`: cheap, and true too often."""
    text = bytes(value)
    return b"\\u" in text or b'"model"' in text.lower()
