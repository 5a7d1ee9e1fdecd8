"""The best choice of one option for each item under a budget: dynamic programming over the budget in small steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STEPS = 1 << 16
"""Costs are rounded up to this part of the budget, so of n items up to n / STEPS of it stays unused."""


def choose(costs: Sequence[Sequence[float]], values: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """Index of an option for each item, with the least sum of values among those whose sum of costs is within `budget`.

    Costs and values are at least 0, one sequence for each item. None: even the least costs are beyond the budget.
    """
    best = np.zeros(STEPS + 1)
    picks = np.zeros((len(costs), STEPS + 1), np.uint8)
    steps = [[_steps(cost, budget) for cost in of_one] for of_one in costs]
    for item, of_one in enumerate(steps):
        found = np.full(STEPS + 1, np.inf)
        for option, step in enumerate(of_one):
            if step <= STEPS:
                value = best[: STEPS + 1 - step] + values[item][option]
                better = value < found[step:]
                found[step:][better] = value[better]
                picks[item, step:][better] = option
        best = found
    if np.isinf(best[-1]):
        return None
    left, chosen = STEPS, []
    for item in reversed(range(len(costs))):
        chosen.append(int(picks[item, left]))
        left -= steps[item][chosen[-1]]
    return chosen[::-1]


def _steps(cost: float, budget: float) -> int:
    """Rounded up; more than STEPS for what is beyond the budget alone."""
    return 0 if cost == 0 else STEPS + 1 if cost > budget else int(np.ceil(cost / budget * STEPS))
