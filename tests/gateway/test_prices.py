"""What a call costs."""

from __future__ import annotations

import pytest

from taskyard.errors import SetupError
from taskyard.gateway.prices import BUILT_IN, MAX_MODEL_NAME, Price, Prices, Tokens

PRICES = Prices({}).extended(
    {
        "small": {"input": 1, "output": 5},
        "small-plus": {"input": 2, "output": 10, "cache_read": 0.2, "cache_write": 2.5, "cache_write_1h": 4},
        "long": {
            "input": 1,
            "output": 2,
            "cache_read": 0.5,
            "above": {"tokens": 1000, "input": 10, "output": 20},
        },
        "acme/small": {"input": 7, "output": 7},
    }
)


@pytest.mark.parametrize(
    ("model", "row"),
    [
        ("small", "small"),
        ("SMALL", "small"),
        ("small-20260401", "small"),
        ("small@20260401", "small"),
        ("small:thinking", "small"),
        ("small[1m]", "small"),
        ("small-plus-20260401", "small-plus"),
        ("smaller", None),
        ("small.1", None),
        ("smal", None),
        ("", None),
        ("acme/small", "acme/small"),
        ("acme/small-x", "acme/small"),
        ("other/small", "small"),
        ("a/b/small", "small"),
        ("anthropic.small-v1:0", "small"),
        ("eu.anthropic.small-v1:0", "small"),
        ("bedrock/us.anthropic.small-v1:0", "small"),
        ("openai/small", "small"),
        ("evil.small", None),
        ("small" + "-" * MAX_MODEL_NAME, None),
    ],
)
def test_which_row(model: str, row: str | None) -> None:
    assert PRICES.of(model) == (None if row is None else PRICES.of(row))
    assert row is None or PRICES.of(row) is not None


def test_a_name_without_end() -> None:
    """It takes hours when each part of it is looked up."""
    assert PRICES.of("small" + "-" * 10_000_000) is None


def test_the_sum() -> None:
    million = 1_000_000
    tokens = Tokens(million, 2 * million, 3 * million, 4 * million, million)
    assert PRICES.cost("small-plus", tokens) == pytest.approx(2 + 20 + 0.6 + 3 * 2.5 + 4)
    # What has no price of its own costs as much as input.
    assert PRICES.cost("small", tokens) == pytest.approx(1 + 10 + 3 + 4)
    assert PRICES.cost("nobody's", tokens) is None
    assert PRICES.cost(None, tokens) is None


def test_long_prompts() -> None:
    assert PRICES.cost("long", Tokens(1000, 1_000_000)) == pytest.approx(2.001)
    assert PRICES.cost("long", Tokens(1001, 1_000_000)) == pytest.approx(20.01001)
    # Cached tokens count for the length; their own price stays when none is named.
    assert PRICES.cost("long", Tokens(0, 0, 2_000_000)) == pytest.approx(1.0)


def test_rows_of_the_settings_replace() -> None:
    mended = BUILT_IN.extended({"Claude-Sonnet-4-5": {"input": 1, "output": 1}})
    assert mended.of("claude-sonnet-4-5-20250929") == Price(1, 1, 1, 1, 1)
    assert mended.of("gpt-5.5") == BUILT_IN.of("gpt-5.5")
    assert BUILT_IN.of("claude-sonnet-4-5") != mended.of("claude-sonnet-4-5")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"input": 1},
        {"input": 1, "output": "2"},
        {"input": 1, "output": True},
        {"input": -1, "output": 1},
        {"input": 1, "output": float("nan")},
        {"input": 1, "output": float("inf")},
        {"input": 1, "output": 1, "inputs": 1},
        {"input": 1, "output": 1, "above": 3},
        {"input": 1, "output": 1, "above": {"input": 3}},
        {"input": 1, "output": 1, "above": {"tokens": "1", "input": 3}},
        {"input": 1, "output": 1, "above": {"tokens": 1, "inputs": 3}},
    ],
    ids=range(12),
)
def test_rows_that_cannot_be_read(row: dict[str, object]) -> None:
    with pytest.raises(SetupError, match=r"model 'mine' in the setting models\.prices"):
        BUILT_IN.extended({"mine": row})


@pytest.mark.parametrize("model", ["claude-sonnet-4-5-20250929", "claude-haiku-4-5", "gpt-5.5", "gpt-5-mini"])
def test_the_built_in_list(model: str) -> None:
    price = BUILT_IN.of(model)
    assert price is not None
    assert 0 < price.cache_read < price.input < price.output
