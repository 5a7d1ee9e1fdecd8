"""How much memory this process has, and giving back what it no longer needs.

Linux tells by /proc; elsewhere a reading is None. The C library keeps freed memory for later: after a graph was opened
or closed `trim` returns it, or the process would seem to hold it, and does. Of the embedded model's graphs, opened and
run on ONNX Runtime and then closed, 116 of 197 MB.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LARGE = 1 << 20
"""Bytes from which a block is the system's own, and goes back to it as soon as it is freed."""
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h."""
_STATUS = {name: re.compile(rf"^{name}:\s+(\d+) kB", re.MULTILINE) for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (\S{4}) \S+ \S+ \S+ *(.*)$")
_RSS = re.compile(r"^Rss:\s+(\d+) kB")


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes of a process at one moment."""

    rss: int
    """The resident set."""
    peak: int
    """The largest resident set so far, or since `reset_peak`."""
    anonymous: int
    file: int
    """Of mapped files: programs' code, and weights that an engine maps."""


def read(process: int | str = "self") -> Reading | None:
    """A process's memory; None for one that is gone, and on systems other than Linux. Takes 20 µs."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = {name: pattern.search(status) for name, pattern in _STATUS.items()}
    peak, rss, anonymous, file = (1024 * int(match[1]) if match else None for match in found.values())
    if peak is None or rss is None:  # a process that has ended, and waits for its parent
        return None
    return Reading(rss, peak, anonymous or 0, file or 0)


def code() -> int:
    """Resident bytes of programs and libraries in this process, which all graphs of an engine share; 0 if unknown."""
    held: dict[str, int] = {}
    programs, path = set(), ""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        if mapping := _MAPPING.match(line):
            path = mapping[2]
            if "x" in mapping[1] and path.startswith("/"):
                programs.add(path)
        elif resident := _RSS.match(line):
            held[path] = held.get(path, 0) + 1024 * int(resident[1])
    return sum(held[path] for path in programs)


def available() -> int | None:
    """Bytes that new programs could take without swapping, by the kernel's estimate; None where it does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


def reset_peak() -> bool:
    """Let this process's peak start anew; False where the kernel does not do it. Whoever reads the peak sees it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def give_way() -> None:
    """Let the system end this process before others when memory runs out, where it can be told so."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def trim() -> None:
    """Return freed memory to the system, where the C library is one that would keep it. Takes up to some ms."""
    trimmer = _function("malloc_trim")
    if trimmer is not None:
        trimmer(0)


@functools.cache
def return_large_blocks() -> None:
    """From now on and for the whole process, give large blocks back when they are freed.

    By default glibc raises that threshold to the largest block that was freed, up to 32 MB: tensors then lie in heaps
    that no longer shrink.
    """
    setter = _function("mallopt")
    if setter is not None:
        setter(_MMAP_THRESHOLD, LARGE)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """One of glibc's; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
    return function
