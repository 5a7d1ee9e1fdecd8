"""What a record's raw samples come to: the figures that tables, plots and comparisons show.

Warm means: all but a process's first, which pays for what an engine does once. Where every process did a thing only
once, there is nothing warm, and the first ones count; `Figures.cold` then names it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from pocketdiffusion_bench.events import OPENING
from pocketdiffusion_bench.record import MemoryPeaks, Record, Run
from pocketdiffusion_bench.stats import Summary, summarize


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds, bytes, joules; None where nothing was measured."""

    image: Summary | None
    """One picture, from the request to the file."""
    step: Summary | None
    first: Summary | None
    """From just before the process was created to its first picture."""
    memory: MemoryPeaks
    """The largest of all runs."""
    joules_per_image: float | None
    """Of the whole process over its pictures, median of the runs."""
    cold: tuple[str, ...]
    """Which of "image" and "step" hold first samples, for lack of warm ones."""

    @property
    def steps_per_second(self) -> float | None:
        """Of the median step."""
        return None if self.step is None else 1 / self.step.p50

    @property
    def images_per_minute(self) -> float | None:
        """Of the median picture."""
        return None if self.image is None else 60 / self.image.p50


def figures(record: Record) -> Figures:
    """The figures of a record; those of one that was not measured are None."""
    by_run = {name: [run_samples(run, name) for run in record.runs] for name in ("image", "step")}
    pictures = [(run, len(samples)) for run, samples in zip(record.runs, by_run["image"], strict=True) if samples]
    joules = [run.joules / count for run, count in pictures if run.joules is not None]
    return Figures(
        image=summarize(pooled(by_run["image"])),
        step=summarize(pooled(by_run["step"])),
        first=summarize([first_picture(run) for run, _ in pictures]),
        memory=largest(run.memory for run in record.runs),
        joules_per_image=statistics.median(joules) if joules else None,
        cold=tuple(name for name, runs in by_run.items() if any(runs) and not any(len(run) > 1 for run in runs)),
    )


def run_samples(run: Run, name: str) -> list[float]:
    """Seconds of one run's spans of one name, in their order."""
    return [span.seconds for span in run.spans if span.name == name]


def warm(samples: list[list[float]]) -> list[list[float]]:
    """Each run's samples without its first; the samples as they are when no run has more than one."""
    return [run[1:] for run in samples if len(run) > 1] or [run for run in samples if run]


def pooled(samples: list[list[float]]) -> list[float]:
    """The warm samples of all runs."""
    return [value for run in warm(samples) for value in run]


def first_picture(run: Run) -> float:
    """Seconds from just before the process was created to the end of its first picture. Raises ValueError for none."""
    return min(span.start + span.seconds for span in run.spans if span.name == "image")


def stage_seconds(record: Record) -> dict[str, float]:
    """Where a process's first picture goes: name -> median seconds until then, in the order of their first start.

    Left out are "image", which encloses others, and openings in threads, for which "wait_open" is what the run waited.
    """
    stages: dict[str, list[float]] = {}
    for run in record.runs:
        if not run_samples(run, "image"):
            continue
        until, sums = first_picture(run), dict[str, float]()
        for span in sorted(run.spans, key=lambda span: span.start):
            if span.name != "image" and not span.name.startswith(OPENING) and span.start < until:
                sums[span.name] = sums.get(span.name, 0.0) + span.seconds
        for name, seconds in sums.items():
            stages.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in stages.items()}


def largest(peaks: Iterable[MemoryPeaks]) -> MemoryPeaks:
    """The largest of each kind; None where none was read."""
    found = list(peaks)
    names = ("rss", "anonymous", "file", "pss", "cgroup")
    values = {name: [value for peak in found if (value := getattr(peak, name)) is not None] for name in names}
    return MemoryPeaks(**{name: max(known) if known else None for name, known in values.items()})
