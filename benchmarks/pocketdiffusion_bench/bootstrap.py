"""How sure a ratio of two medians is: a hierarchical bootstrap.

Samples of one process share what the machine was doing and where its memory lay, so processes are drawn with
replacement first, then samples inside each drawn process; drawing all samples alike would make the interval too narrow
(Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 3.8). The interval holds the middle
`CONFIDENCE` of the resampled ratios. With few processes it is still somewhat too narrow, and from one process it could
only show the spread inside that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocketdiffusion.tensors import AnyArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
_CHUNK = 500
"""Resamples at a time, which bounds memory."""

Processes = Sequence[Sequence[float]]
"""Samples of each process, at least one in each."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio and its confidence interval."""

    ratio: float
    low: float
    high: float


def ratio_interval(before: Processes, after: Processes, *, resamples: int = RESAMPLES) -> Interval:
    """Median of all samples after, over the median before; equal inputs give equal intervals (the seed is fixed)."""
    random = np.random.default_rng(SEED)
    ratios = _medians(after, resamples, random) / _medians(before, resamples, random)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(_median(after) / _median(before), float(low), float(high))


def _median(processes: Processes) -> float:
    return float(np.median(np.concatenate([np.asarray(process, np.float64) for process in processes])))


def _medians(processes: Processes, resamples: int, random: np.random.Generator) -> AnyArray:
    """The median of each resample, float64 (resamples,)."""
    counts = np.array([len(process) for process in processes])
    samples = np.full((len(processes), counts.max()), np.nan)
    for row, process in zip(samples, processes, strict=True):
        row[: len(process)] = process
    chunks = [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]
    return np.concatenate([_chunk(samples, counts, size, random) for size in chunks])


def _chunk(samples: AnyArray, counts: AnyArray, resamples: int, random: np.random.Generator) -> AnyArray:
    processes, longest = samples.shape
    drawn = random.integers(processes, size=(resamples, processes, 1))
    places = (random.random((resamples, processes, longest)) * counts[drawn]).astype(np.intp)
    values = np.where(np.arange(longest) < counts[drawn], samples[drawn, places], np.nan).reshape(resamples, -1)
    median = np.nanmedian if (counts < longest).any() else np.median
    medians: AnyArray = median(values, axis=1)
    return medians
