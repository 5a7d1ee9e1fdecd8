"""Named time spans and peak memory: part of every result.

Spans are wall time in seconds from `time.perf_counter`; samples are kept raw, one per call, in the order they ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class Timings:
    """Raw samples by span name, e.g. ``{"text_encode": [0.01], "step": [0.02, 0.02], "vae_decode": [0.05]}``."""

    samples: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block and add it under `name`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add one sample."""
        self.samples.setdefault(name, []).append(seconds)

    def total(self, name: str) -> float:
        """Sum of the samples under `name` in seconds, 0.0 when there are none."""
        return sum(self.samples.get(name, ()))


def timed(items: Iterator[Item], timings: Timings, name: str) -> Iterator[Item]:
    """Pass items on and add the time that making each took; what the consumer does in between is not counted."""
    while True:
        start = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        timings.add(name, time.perf_counter() - start)
        yield item


def peak_rss() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
