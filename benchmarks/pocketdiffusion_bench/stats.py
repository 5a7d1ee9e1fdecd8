"""Samples in a few numbers.

The median is the middle sample, or the mean of the two in the middle. Every other percentile is the nearest rank: the
smallest sample that at least so many per cent of all are not above (Hyndman and Fan 1996, definition 1), thus always a
value that was measured; with fewer than ten samples p90 is the largest. numpy's default would interpolate, and make a
"p90" of three samples out of two of them. The standard deviation is the sample's (n - 1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of at least one sample, in the samples' unit."""

    count: int
    min: float
    p50: float
    p90: float
    mean: float
    sd: float | None
    """None for a single sample, which has no spread."""

    @property
    def cv(self) -> float | None:
        """Coefficient of variation: standard deviation over mean."""
        return None if self.sd is None or self.mean == 0 else self.sd / self.mean


def summarize(samples: Sequence[float]) -> Summary | None:
    """The samples' summary, None when there are none."""
    if not samples:
        return None
    return Summary(
        count=len(samples),
        min=min(samples),
        p50=statistics.median(samples),
        p90=percentile(samples, 90),
        mean=statistics.fmean(samples),
        sd=statistics.stdev(samples) if len(samples) > 1 else None,
    )


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest rank's sample. Raises ValueError without samples or outside of (0, 100]."""
    if not samples or not 0 < percent <= 100:
        raise ValueError(f"percentile {percent} of {len(samples)} samples; it takes (0, 100] of at least one")
    return sorted(samples)[math.ceil(percent * len(samples) / 100) - 1]
