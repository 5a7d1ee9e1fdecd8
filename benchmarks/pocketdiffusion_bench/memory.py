"""Memory of a running process, read from outside.

Cost: `status` takes 17 µs whatever the size. `smaps_rollup`, the only source of PSS, walks the page tables: 12 ms for
each GB of small pages, during which the process can't map memory, so it is read rarely, and near a peak only.
Only Linux tells; elsewhere there are no samples, and the peak is the kernel's when the process ends.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pocketdiffusion_bench.events import Interval
from pocketdiffusion_bench.record import MemoryPeaks

PSS_REST = 500
"""PSS is read again after this many times the seconds that its last reading took."""
NEAR_PEAK = 0.95
"""Of the largest resident set so far: below, PSS has no peak."""


_STATUS = re.compile(rb"VmHWM:\s+(\d+) kB\nVmRSS:\s+(\d+) kB\nRssAnon:\s+(\d+) kB\nRssFile:\s+(\d+) kB")
_PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes at one moment."""

    at: float
    """`time.perf_counter` seconds."""
    rss: int
    anonymous: int
    file: int
    peak: int
    """Largest resident set so far, the kernel's own."""
    pss: int | None


class Sampler:
    """Collects samples of a process."""

    def __init__(self, pid: int) -> None:
        self.samples: list[Sample] = []
        self._files = {name: _open(f"/proc/{pid}/{name}") for name in ("status", "smaps_rollup")}
        self._next_pss = 0.0

    def close(self) -> None:
        """No further sample is taken."""
        for file in self._files.values():
            if file is not None:
                os.close(file)
        self._files = {}

    def take(self) -> None:
        """Add one sample, if the process is still there and the system tells."""
        found = _STATUS.search(self._read("status"))
        if found is not None:
            peak, rss, anonymous, file = (1024 * int(value) for value in found.groups())
            at = time.perf_counter()
            pss = self._pss(at) if rss >= NEAR_PEAK * peak else None
            self.samples.append(Sample(at, rss, anonymous, file, peak, pss))

    def _pss(self, now: float) -> int | None:
        if now < self._next_pss:
            return None
        found = _PSS.search(self._read("smaps_rollup"))
        done = time.perf_counter()
        self._next_pss = done + PSS_REST * (done - now)
        return None if found is None else 1024 * int(found[1])

    def _read(self, name: str) -> bytes:
        """What a file of /proc tells now; nothing where there is none, or the process has gone."""
        file = self._files.get(name)
        try:
            return b"" if file is None else os.pread(file, 8192, 0)
        except OSError:
            return b""


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def peaks(samples: Sequence[Sample], *, rss: int | None = None, cgroup: int | None = None) -> MemoryPeaks:
    """The largest of each kind. `rss` is a kernel's maximum, which a sample can't exceed; None takes the samples'."""
    return MemoryPeaks(
        rss=rss if rss is not None else _largest(sample.rss for sample in samples),
        anonymous=_largest(sample.anonymous for sample in samples),
        file=_largest(sample.file for sample in samples),
        pss=_largest(sample.pss for sample in samples),
        cgroup=cgroup,
    )


def by_stage(samples: Sequence[Sample], spans: Iterable[Interval]) -> dict[str, MemoryPeaks]:
    """Span name -> peaks of the samples taken while one of that name ran; names without a sample are left out."""
    within: dict[str, list[Sample]] = {}
    for span in spans:
        found = [sample for sample in samples if span.start <= sample.at <= span.end]
        if found:
            within.setdefault(span.name, []).extend(found)
    return {name: peaks(found) for name, found in within.items()}


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
