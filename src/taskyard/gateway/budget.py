"""What a run may spend on models, and how much of it is gone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Tab:
    """What one call has used so far. Two that have used the same are two."""

    tokens: int = 0
    cost: float = 0.0


class Budget:
    """Limits of one run, and the sums of its calls, those that still go on included.

    cost: US dollars. tokens: all but those read from a cache. None: no limit. `spent_*`: by calls of earlier
    workers of the run. project_month_cost: US dollars of all runs of its project in this month, `spent_month` of them
    by now, those of this run included.
    """

    def __init__(
        self,
        cost: float | None = None,
        tokens: int | None = None,
        *,
        spent_cost: float = 0.0,
        spent_tokens: int = 0,
        project_month_cost: float | None = None,
        spent_month: float = 0.0,
    ) -> None:
        self._cost = cost
        self._tokens = tokens
        self._month = project_month_cost
        self._before_month = spent_month - spent_cost
        self._spent = Tab(spent_tokens, spent_cost)
        self._open: list[Tab] = []

    @property
    def limited(self) -> bool:
        return self.in_dollars or self._tokens is not None

    @property
    def in_dollars(self) -> bool:
        """Whether the price of each call matters."""
        return self._cost is not None or self._month is not None

    @property
    def exceeded(self) -> str | None:
        """Why no further call may be made, as a sentence; None while one may."""
        cost = self._spent.cost + sum(tab.cost for tab in self._open)
        if self._cost is not None and cost >= self._cost:
            return f"this run's budget of ${_dollars(self._cost)} is used up (${_dollars(cost)} were spent)."
        if self._month is not None and (month := self._before_month + cost) >= self._month:
            return (
                f"the budget of ${_dollars(self._month)} that this run's project has for a month is used up"
                f" (${_dollars(month)} were spent)."
            )
        used = self._spent.tokens + sum(tab.tokens for tab in self._open)
        if self._tokens is not None and used >= self._tokens:
            return f"this run's budget of {self._tokens:,} tokens is used up ({used:,} were used)."
        return None

    def open(self) -> Tab:
        """A call begins."""
        tab = Tab()
        self._open.append(tab)
        return tab

    def close(self, tab: Tab, tokens: int, cost: float) -> None:
        """It has ended, and this is what it used in all."""
        self._open.remove(tab)
        self._spent.tokens += tokens
        self._spent.cost += cost


def _dollars(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4g}"
