"""What a call of a model costs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from importlib import resources
from typing import Any

from taskyard.errors import SetupError

MAX_MODEL_NAME = 200
"""Characters. Longer ones are nobody's, and have no price."""
_MILLION = 1_000_000
_BOUNDARY = "-@:["
_FIELDS = {"input", "output", "cache_read", "cache_write", "cache_write_1h"}


@dataclass(frozen=True)
class Tokens:
    """Tokens of one call or of several. `input`: neither read from nor written to the prompt cache."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    """Both kinds of cache entries."""
    cache_write_1h: int = 0
    """Those of `cache_write` that live for an hour, which some vendors charge more for."""

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    @property
    def prompt(self) -> int:
        return self.input + self.cache_read + self.cache_write

    @property
    def counted(self) -> int:
        """What a budget of tokens counts: all but those read from a cache, which cost a tenth or less."""
        return self.input + self.output + self.cache_write


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens. What a vendor has no price of its own for costs as much as input."""

    input: float
    output: float
    cache_read: float
    cache_write: float
    cache_write_1h: float
    above_tokens: int | None = None
    above: Price | None = None
    """The price of all tokens of a call whose prompt has more than `above_tokens`."""

    def cost(self, tokens: Tokens) -> float:
        """US dollars for one call."""
        if self.above is not None and self.above_tokens is not None and tokens.prompt > self.above_tokens:
            return self.above.cost(tokens)
        return (
            tokens.input * self.input
            + tokens.output * self.output
            + tokens.cache_read * self.cache_read
            + (tokens.cache_write - tokens.cache_write_1h) * self.cache_write
            + tokens.cache_write_1h * self.cache_write_1h
        ) / _MILLION


class Prices:
    """Prices by name of model."""

    def __init__(self, rows: Mapping[str, Price]) -> None:
        self._rows = {name.lower(): price for name, price in rows.items()}

    def of(self, model: str) -> Price | None:
        """The price of a model; None when nobody has said it.

        Names of routers and clouds (`anthropic/claude-…`, `eu.anthropic.claude-…`) count without what is in front
        when they have no price of their own.
        """
        if len(model) > MAX_MODEL_NAME:
            return None
        name = model.lower()
        bare = re.sub(r"^([a-z]+\.)?(anthropic|openai)\.", "", name.rpartition("/")[2])
        for candidate in (name, bare):
            for end in range(len(candidate), 0, -1):
                if end < len(candidate) and candidate[end] not in _BOUNDARY:
                    continue
                if (price := self._rows.get(candidate[:end])) is not None:
                    return price
        return None

    def cost(self, model: str | None, tokens: Tokens) -> float | None:
        """US dollars for one call; None when the model's price is not known."""
        price = None if model is None else self.of(model)
        return None if price is None else price.cost(tokens)

    def extended(self, rows: Mapping[str, Mapping[str, Any]]) -> Prices:
        """With further rows, in the form of `prices.toml`. Raises SetupError for one that cannot be read."""
        return Prices(self._rows | {name.lower(): _price(name, row) for name, row in rows.items()})


def _price(name: str, row: Mapping[str, Any]) -> Price:
    above = row.get("above")
    fields = {key: value for key, value in row.items() if key != "above"}
    good = {"input", "output"} <= fields.keys() <= _FIELDS and all(map(_is_price, fields.values()))
    if above is not None:
        good = good and isinstance(above, Mapping) and type(above.get("tokens")) is int
    if not good:
        raise SetupError(
            f"The price of the model '{name}' in the setting models.prices cannot be read. It needs input and output "
            "in US dollars for a million tokens, and may have cache_read, cache_write and cache_write_1h: "
            '{"my-model": {"input": 3, "output": 15}}.'
        )
    given = {key: float(value) for key, value in fields.items()}
    basis = given["input"]
    write = given.get("cache_write", basis)
    price = Price(
        basis,
        given["output"],
        given.get("cache_read", basis),
        write,
        given.get("cache_write_1h", write),
    )
    if above is None:
        return price
    higher = {key: value for key, value in above.items() if key != "tokens"}
    return replace(price, above_tokens=above["tokens"], above=_price(name, {**given, **higher}))


def _is_price(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MILLION


def _built_in() -> Prices:
    text = resources.files(__package__).joinpath("prices.toml").read_text("utf-8")
    return Prices({}).extended(tomllib.loads(text))


BUILT_IN = _built_in()
"""The list in `prices.toml`."""
