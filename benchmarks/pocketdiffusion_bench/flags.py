"""What makes figures doubtful, in sentences that go into the record. Nothing is hidden and nothing is corrected."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence

from pocketdiffusion_bench.events import OPENING
from pocketdiffusion_bench.figures import run_samples, warm
from pocketdiffusion_bench.record import Run
from pocketdiffusion_bench.stats import summarize

MAX_CV = 0.03
MAX_OTHERS = 0.05
"""Share of all processors' time that other processes may take."""
MAX_GAP = 0.02
"""Share of a process's time that its stages may miss or count twice."""
MAX_DRIFT = 0.05
"""By which the processors' clock may differ between the runs."""
CACHED = 1 / 3
"""A later picture's step this much shorter than the first picture's has hardly been computed."""
MAX_OFF = 0.15
"""Share of the measured peak by which a memory plan's prediction may miss it."""
APART = ("image",)
"""Spans that enclose others; openings may overlap them."""


def flags(runs: Sequence[Run]) -> list[str]:
    """Doubts that follow from the runs of one case alone."""
    return [*_spread(runs), *_gaps(runs), *_cached(runs)]


def _spread(runs: Sequence[Run]) -> Iterator[str]:
    """Of what people compare: the whole process, and each run's median warm picture and step."""
    by_name = {"process": [run.seconds for run in runs]}
    for name in ("image", "step"):
        samples = warm([run_samples(run, name) for run in runs])
        by_name[name] = [statistics.median(values) for values in samples]
    for name, seconds in by_name.items():
        summary = summarize(seconds)
        if summary is not None and summary.cv is not None and summary.cv > MAX_CV:
            yield (
                f"{name}: the runs differ by {100 * summary.cv:.1f} % (CV of {summary.count}; more than "
                f"{100 * MAX_CV:.0f} %)"
            )


def covered(run: Run) -> float:
    """Seconds that the stages of the main thread add up to."""
    return sum(span.seconds for span in run.spans if span.name not in APART and not span.name.startswith(OPENING))


def _gaps(runs: Sequence[Run]) -> Iterator[str]:
    shares = [covered(run) / run.seconds for run in runs]
    worst = max(shares, key=lambda share: abs(share - 1), default=1.0)
    if abs(worst - 1) > MAX_GAP:
        yield f"the stages add up to {100 * worst:.1f} % of the whole process"


def _cached(runs: Sequence[Run]) -> Iterator[str]:
    """A later picture of equal settings must cost what the first one did, less what engines do once."""
    found = [ratio for run in runs for ratio in _later_to_first(run)]
    if found and min(found) < CACHED:
        yield (
            f"a later picture's steps took {100 * min(found):.0f} % of the first picture's time: a cached result, or a "
            "first picture that pays for compiling"
        )


def _later_to_first(run: Run) -> Iterator[float]:
    """Each later picture's median step against the first picture's, whose own first step is left out if it can be."""
    pictures = [span for span in run.spans if span.name == "image"]
    steps = [
        [
            span.seconds
            for span in run.spans
            if span.name == "step" and image.start <= span.start < image.start + image.seconds
        ]
        for image in pictures
    ]
    if not steps or not steps[0]:
        return
    first = statistics.median(steps[0][1:] or steps[0])
    for later in steps[1:]:
        whole = [*later, *[0.0] * (len(steps[0]) - len(later))]  # a step that was not run took no time
        yield statistics.median(whole) / first


def prediction(predicted: int | None, runs: Sequence[Run]) -> list[str]:
    """A flag if a plan's predicted peak, in bytes, is far from what the processes took."""
    peaks = [run.memory.rss for run in runs if run.memory.rss is not None]
    if predicted is None or not peaks:
        return []
    off = max((predicted / peak - 1 for peak in peaks), key=abs)
    said = f"its plan predicted {predicted / 1e6:,.0f} MB, {100 * abs(off):.0f} % {'over' if off > 0 else 'under'} the"
    return [f"{said} peak"] if abs(off) > MAX_OFF else []


def busy(others: Sequence[float | None]) -> list[str]:
    """A flag if other processes took more than `MAX_OTHERS` during a run."""
    worst = max((share for share in others if share is not None), default=0.0)
    if worst <= MAX_OTHERS:
        return []
    return [f"the machine was busy: other processes took up to {100 * worst:.0f} % of the processors' time"]


def drift(frequencies: Sequence[float | None], throttled: Sequence[int | None]) -> list[str]:
    """Flags for a clock that changed from run to run, and for slowing down by heat."""
    known = [value for value in frequencies if value is not None]
    events = [value for value in throttled if value is not None]
    found = []
    if known and max(known) - min(known) > MAX_DRIFT * max(known):
        found.append(f"the processors' clock moved between {min(known) / 1e6:.0f} and {max(known) / 1e6:.0f} MHz")
    if events and events[-1] > events[0]:
        found.append(f"the processors were slowed down by heat {events[-1] - events[0]} times")
    return found


def unequal(pictures: Collection[str]) -> list[str]:
    """A flag if one case, seed and all, made different pictures; they are given by their hashes."""
    return [f"equal requests made {len(pictures)} different pictures"] if len(pictures) > 1 else []
