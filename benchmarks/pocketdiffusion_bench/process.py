"""One measured process: created, sampled from outside, limited if asked for, and waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pocketdiffusion_bench.energy import Meter
from pocketdiffusion_bench.events import START
from pocketdiffusion_bench.limit import Group, make_group
from pocketdiffusion_bench.machine import cpu_seconds
from pocketdiffusion_bench.memory import Sample, Sampler, peaks
from pocketdiffusion_bench.record import MemoryPeaks

INTERVAL = 0.02
"""Seconds between samples, growing to a two-thousandth of the time so far, so that a long run fills no memory."""
METER_REST = 60.0
"""Seconds between readings of energy counters, which begin anew after some minutes."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended."""

    start: float
    """`time.perf_counter` just before it was created."""
    end: float
    code: int
    """Exit code; minus a signal's number."""
    message: str
    """Its last line on stderr, "" for none."""
    samples: Sequence[Sample]
    memory: MemoryPeaks
    killed: bool
    """Whether its memory limit ended it."""
    timed_out: bool
    cpu: float | None
    """Seconds of processor time that it used itself; None on Windows."""
    others: float | None
    """Share of all processors' time that other processes used meanwhile, in [0, 1]; None where it can't be read."""
    note: str | None
    """What makes its memory limit something else than that."""
    joules: float | None = None
    """Of the whole machine meanwhile; None where no counter can be read."""
    energy_source: str | None = None


class _Waiter(threading.Thread):
    """Waits in a thread, so that the end is noticed at once and the kernel's figures are read with it."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.end = 0.0
        self.cpu: float | None = None
        self.peak: int | None = None
        self._child = child

    def run(self) -> None:
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(self._child.pid, 0)
            self.end = time.perf_counter()
            self._child.returncode = os.waitstatus_to_exitcode(status)
            self.cpu = usage.ru_utime + usage.ru_stime
            self.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        else:
            self._child.wait()
            self.end = time.perf_counter()
        self.ended.set()


def run_process(
    command: Sequence[str], *, limit: int | None = None, timeout: float = 3600.0, sample: bool = True
) -> Ended:
    """Run a command to its end, or kill it after `timeout` seconds. Its stdout is dropped.

    `limit` is in bytes, without swap. Without `sample` only the kernel's own figures are read: what sampling costs is
    measured by that. Raises BenchError where a limit can't be set, and OSError for a command that can't be started.
    """
    group = make_group(limit)
    try:
        with tempfile.TemporaryFile() as errors:
            return _run(command, group, errors, timeout, sample)
    finally:
        group.close()


def _run(command: Sequence[str], group: Group, errors: BinaryIO, timeout: float, sample: bool) -> Ended:
    meter = Meter()
    meter.start()
    before, own = cpu_seconds(), time.process_time()
    start = time.perf_counter()
    child = subprocess.Popen(
        group.command(command),
        env={**os.environ, START: repr(start)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,  # so that a kill reaches what it started
    )
    waiter = _Waiter(child)
    waiter.start()
    sampler = Sampler(child.pid)
    try:
        in_time = _watch(waiter.ended, timeout, sampler if sample else None, meter)
    finally:
        if not waiter.ended.is_set():
            _kill(child)  # a timeout, or Ctrl+C
        waiter.ended.wait()
        sampler.close()
    joules, source = meter.stop()
    after = cpu_seconds()
    others = None
    if before is not None and after is not None and waiter.cpu is not None:
        mine = waiter.cpu + time.process_time() - own
        others = max(0.0, (after.busy - before.busy - mine) / (after.total - before.total or 1.0))
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return Ended(
        start=start,
        end=waiter.end,
        code=child.returncode,
        message=lines[-1] if lines else "",
        samples=sampler.samples,
        memory=peaks(sampler.samples, rss=_peak(waiter.peak, sampler.samples), cgroup=group.peak()),
        killed=group.killed(),
        timed_out=not in_time,
        cpu=waiter.cpu,
        others=others,
        note=group.note,
        joules=joules,
        energy_source=source,
    )


def _kill(child: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()


def _watch(ended: threading.Event, timeout: float, sampler: Sampler | None, meter: Meter) -> bool:
    """Sample until the event, whose coming is noticed at once, or False after `timeout` seconds."""
    start = metered = time.perf_counter()
    while not ended.wait(max(INTERVAL, (time.perf_counter() - start) / 2000)):
        now = time.perf_counter()
        if sampler is not None:
            sampler.take()
        if now - metered > METER_REST:
            metered = now
            meter.update()
        if now - start > timeout:
            return False
    return True


def _peak(kernel: int | None, samples: Sequence[Sample]) -> int | None:
    """The kernel's maximum of a process.

    What `wait4` tells includes the parent's resident set, which a process shares between its creation and the loading
    of its own program. Where that may be it, the largest "VmHWM" stands, which is the program's own.
    """
    if kernel is None or not samples or kernel > _own_peak():
        return kernel
    return max(sample.peak for sample in samples)


def _own_peak() -> int:
    from pocketdiffusion.timing import peak_rss

    return peak_rss() or 0
