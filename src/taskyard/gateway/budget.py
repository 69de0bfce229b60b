"""What a run may spend on models, and how much of it is gone."""

from __future__ import annotations

from dataclasses import dataclass

from taskyard.gateway.prices import Tokens


@dataclass
class Tab:
    """What one call has used so far."""

    tokens: int = 0
    cost: float = 0.0


class Budget:
    """Limits of one run, and the sums of its calls, those that still go on included.

    cost: US dollars. tokens: all but those read from a cache. None: no limit. `spent_*`: by calls of earlier
    workers of the run.
    """

    def __init__(
        self,
        cost: float | None = None,
        tokens: int | None = None,
        *,
        spent_cost: float = 0.0,
        spent_tokens: int = 0,
    ) -> None:
        self.cost = cost
        self.tokens = tokens
        self._spent = Tab(spent_tokens, spent_cost)
        self._open: list[Tab] = []

    @property
    def limited(self) -> bool:
        return self.cost is not None or self.tokens is not None

    @property
    def exceeded(self) -> str | None:
        """Why no further call may be made, as a sentence; None while one may."""
        if self.cost is not None and (spent := self._sum_cost()) >= self.cost:
            return f"this run's budget of ${_dollars(self.cost)} is used up (${_dollars(spent)} were spent)."
        if self.tokens is not None and (used := self._sum_tokens()) >= self.tokens:
            return f"this run's budget of {self.tokens:,} tokens is used up ({used:,} were used)."
        return None

    def open(self) -> Tab:
        """A call begins."""
        tab = Tab()
        self._open.append(tab)
        return tab

    def close(self, tab: Tab, tokens: Tokens, cost: float | None) -> None:
        """It has ended, and this is what it used in all."""
        self._open.remove(tab)
        self._spent.tokens += tokens.counted
        self._spent.cost += cost or 0.0

    def _sum_cost(self) -> float:
        return self._spent.cost + sum(tab.cost for tab in self._open)

    def _sum_tokens(self) -> int:
        return self._spent.tokens + sum(tab.tokens for tab in self._open)


def _dollars(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4g}"
