"""Named spans: where they lie, and what they add up to."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pocketdiffusion.timing import Timings, timed


def test_spans_lie_where_they_were() -> None:
    timings, before = Timings(), time.perf_counter()
    with timings.span("outer"), timings.span("inner"):
        pass
    after = time.perf_counter()
    inner, outer = timings.spans
    assert (inner.name, outer.name) == ("inner", "outer")
    assert before <= outer.start <= inner.start
    assert inner.start + inner.seconds <= outer.start + outer.seconds <= after


def test_samples_are_the_seconds_by_name() -> None:
    timings = Timings()
    timings.add("step", 2.0, start=10.0)
    timings.add("step", 3.0, start=12.0)
    timings.add("save", 1.0)
    assert timings.samples == {"step": [2.0, 3.0], "save": [1.0]}
    assert (timings.total("step"), timings.total("absent")) == (5.0, 0.0)
    assert timings.spans[0].start == 10.0
    assert abs(timings.spans[2].start + 1.0 - time.perf_counter()) < 10


def test_a_failing_block_is_timed_too() -> None:
    timings = Timings()
    with pytest.raises(OSError), timings.span("step"):
        raise OSError
    assert list(timings.samples) == ["step"]


def test_what_the_consumer_does_is_not_timed() -> None:
    made: list[float] = []

    def items() -> Iterator[int]:
        for item in range(3):
            made.append(time.perf_counter())
            yield item

    timings, taken = Timings(), []
    for item in timed(items(), timings, "step"):
        taken.append(item)
        resumed = time.perf_counter()
        assert timings.spans[-1].start <= made[-1]
        assert timings.spans[-1].start + timings.spans[-1].seconds <= resumed
    assert taken == [0, 1, 2] and len(timings.spans) == 3
