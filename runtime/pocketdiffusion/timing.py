"""Named time spans and peak memory: part of every result.

Spans are wall time in seconds from `time.perf_counter`; they are kept raw, one per call, in the order they ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class TimedSpan(NamedTuple):
    """One stretch of time."""

    name: str
    start: float
    """`time.perf_counter` seconds: one clock for all threads and processes of a machine."""
    seconds: float


@dataclass(slots=True)
class Timings:
    """Spans of one call. Those of different threads may overlap, and some lie inside others."""

    spans: list[TimedSpan] = field(default_factory=list)

    @property
    def samples(self) -> dict[str, list[float]]:
        """Seconds by span name, e.g. ``{"text_encode": [0.01], "step": [0.02, 0.02], "vae_decode": [0.05]}``."""
        found: dict[str, list[float]] = {}
        for span in self.spans:
            found.setdefault(span.name, []).append(span.seconds)
        return found

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block and add it under `name`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start, start)

    def add(self, name: str, seconds: float, start: float | None = None) -> None:
        """Add one span; without a `start` it ends now."""
        self.spans.append(TimedSpan(name, time.perf_counter() - seconds if start is None else start, seconds))

    def total(self, name: str) -> float:
        """Sum of the samples under `name` in seconds, 0.0 when there are none."""
        return sum(span.seconds for span in self.spans if span.name == name)


def timed(items: Iterator[Item], timings: Timings, name: str) -> Iterator[Item]:
    """Pass items on and add the time that making each took; what the consumer does in between is not counted."""
    while True:
        start = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        timings.add(name, time.perf_counter() - start, start)
        yield item


def peak_rss() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
