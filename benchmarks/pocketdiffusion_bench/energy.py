"""Energy of the whole machine while something runs, where its own counters can be read; never an estimate.

Linux: RAPL's counters of processor packages and memory below /sys/class/powercap (Intel and AMD; most systems let only
root read them). NVIDIA: the driver's counter of each GPU (Volta and later), by NVML. Windows and macOS: nothing, as
macOS tells root only (powermetrics). Everything that runs on the machine counts, so a reading means something on an
idle one.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")
_ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")  # AMD's counters have Intel's name
_COUNTED = re.compile(r"package-\d+|dram")  # "psys" and "core" hold or are parts of them


class Counter(Protocol):
    """Something that counts energy."""

    source: str

    def joules(self) -> float:
        """Energy since the last call, or since it was made. Raises OSError."""
        ...


class Meter:
    """All counters of this machine: `start`, then `stop`, which gives joules and their source."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._powercap = powercap
        self._counters: list[Counter] = []
        self._sum = 0.0

    def start(self) -> None:
        """Count from now on."""
        self._counters, self._sum = [*_rapl(self._powercap), *_nvml()], 0.0

    def update(self) -> None:
        """Call at least every ten minutes: RAPL's counters begin anew at some hundred thousand joules."""
        try:
            self._sum += sum(counter.joules() for counter in self._counters)
        except OSError:
            self._counters = []  # what is missing now can't be made up for

    def stop(self) -> tuple[float | None, str | None]:
        """Joules since `start` and what was read, e.g. "rapl:package-0, nvml:0"; (None, None) where nothing can be."""
        self.update()
        if not self._counters:
            return None, None
        return self._sum, ", ".join(counter.source for counter in self._counters)


@dataclass(slots=True)
class _Rapl:
    """One zone of powercap: `energy_uj` counts microjoules up to `max_energy_range_uj` and then from 0."""

    source: str
    file: Path
    range: int
    last: int

    def joules(self) -> float:
        now = _number(self.file)
        passed, self.last = now - self.last, now
        return (passed if passed >= 0 else passed + self.range) / 1e6


def _rapl(powercap: Path) -> Iterator[_Rapl]:
    """A counter for each package, and for its memory where that is counted apart. None when one is not readable."""
    found = []
    try:
        for zone in sorted(path for path in powercap.iterdir() if _ZONE.fullmatch(path.name)):
            name = (zone / "name").read_text(encoding="ascii").strip()
            if _COUNTED.fullmatch(name):
                file = zone / "energy_uj"
                found.append(_Rapl(f"rapl:{name}", file, _number(zone / "max_energy_range_uj"), _number(file)))
    except OSError:
        return  # a part of the zones would pass for the whole
    yield from found


def _number(file: Path) -> int:
    text = file.read_text(encoding="ascii").strip()
    if not text.isdigit():
        raise OSError(f"{file} holds no number")
    return int(text)


class _Nvml:
    """One GPU's counter, in millijoules since the driver was loaded."""

    def __init__(self, library: ctypes.CDLL, index: int) -> None:
        self.source = f"nvml:{index}"
        self._library, self._device = library, ctypes.c_void_p()
        _check(library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._device)))
        self._last = self._read()

    def joules(self) -> float:
        now = self._read()
        passed, self._last = now - self._last, now
        return passed / 1e3

    def _read(self) -> int:
        value = ctypes.c_ulonglong()
        _check(self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value)))
        return value.value


def _nvml() -> list[_Nvml]:
    """A counter for each GPU; none without NVIDIA's driver, or when one GPU has none."""
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        _check(library.nvmlInit_v2())
        count = ctypes.c_uint()
        _check(library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        return [_Nvml(library, index) for index in range(count.value)]
    except OSError:
        return []


def _check(code: int) -> None:
    if code != 0:
        raise OSError(code, "NVML refused")
