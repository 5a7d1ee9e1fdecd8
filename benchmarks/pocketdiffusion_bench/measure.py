"""One command, measured as a whole process.

Wall time runs from just before the process is created to its end; peak memory is the kernel's own maximum resident set
of that process. On Windows the peak is not read (None).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessRun:
    """A finished process."""

    seconds: float
    peak_rss: int | None
    """Bytes."""
    stdout: str


def run_process(command: Sequence[str]) -> ProcessRun:
    """Run a command to its end. Raises RuntimeError with its last line of stderr when it fails."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr, peak = _finish(child)
    seconds = time.perf_counter() - start
    if child.returncode != 0:
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {last}")
    return ProcessRun(seconds, peak, stdout)


def _finish(child: subprocess.Popen[str]) -> tuple[str, str, int | None]:
    if not hasattr(os, "wait4"):
        stdout, stderr = child.communicate()
        return stdout, stderr, None
    # A few lines of output fit a pipe, so reading one after the other can't block the child.
    stdout = child.stdout.read() if child.stdout else ""
    stderr = child.stderr.read() if child.stderr else ""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return stdout, stderr, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
