"""`--memory-curve`: by bisection, the smallest memory limit at which a case still completes, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pocketdiffusion_bench.record import OK, Record

MB = 10**6
STEP = 8 * MB
SHARE = 0.05
"""The bisection ends when the bounds are `STEP`, or this share of the upper one, apart."""
FLOOR = 16 * MB
"""No Python process with an engine fits into this."""

Attempt = Callable[[int], Record]
"""Measures the case at a limit in bytes."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What was tried, largest limit first."""

    records: tuple[Record, ...]

    @property
    def smallest(self) -> int | None:
        """Bytes of the smallest limit at which the case completed; None where it never did."""
        limits = [record.case.memory_limit for record in self.records if record.status == OK]
        return min((limit for limit in limits if limit is not None), default=None)


def memory_curve(attempt: Attempt, need: int, most: int) -> Curve:
    """Bisect. `need` is what the case used without a limit, `most` what the machine has, in bytes.

    A limit of `need` may not be enough, because files that were in memory before cost nothing there: it is doubled
    until the case completes, or has `most`. Completing is taken to be monotonic in the limit.
    """
    tried: dict[int, Record] = {}

    def completes(limit: int) -> bool:
        tried[limit] = attempt(limit)
        return tried[limit].status == OK

    low, high = FLOOR, max(need, 2 * FLOOR)
    while not completes(high):
        if high >= most:
            return _curve(tried)
        low, high = high, min(2 * high, most)
    while high - low > max(STEP, SHARE * high):
        middle = (low + high) // 2
        if completes(middle):
            high = middle
        else:
            low = middle
    return _curve(tried)


def _curve(tried: dict[int, Record]) -> Curve:
    return Curve(tuple(tried[limit] for limit in sorted(tried, reverse=True)))
