"""What a measurement ran on, and how busy that was. Nothing here names the machine, its user or a path."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pocketdiffusion_bench.limit import parents

ISA = {
    **{name: name for name in ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16")},
    **{name: name for name in ("avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16")},
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    **{name: name for name in ("i8mm", "bf16", "sve", "sve2", "sme")},
}
"""The kernel's word for an instruction set that engines use -> ours."""
MAC_ISA = {
    "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_FP16": "fp16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}
PACKAGES = ("numpy", "onnxruntime", "openvino", "coremltools")
CPUS = Path("/sys/devices/system/cpu")


class CpuSeconds(NamedTuple):
    """Seconds of all processors together, since the machine started."""

    busy: float
    total: float


def describe() -> dict[str, Any]:
    """Processor, memory, system and versions; None for what the system does not tell."""
    linux = _proc_cpuinfo()
    return {
        "cpu": linux.get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or None,
        "architecture": platform.machine(),
        "isa": _isa(linux),
        "cores": _physical_cores(linux) or _number(_sysctl("hw.physicalcpu")),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "virtual": "hypervisor" in linux.get("flags", "").split() if linux else None,
        "governor": _read(CPUS / "cpu0/cpufreq/scaling_governor"),
        "ram": ram(),
        "memory_limit": _limit_of_groups(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "revision": revision(),
    }


def cpu_seconds() -> CpuSeconds | None:
    """From /proc/stat; None where there is none. Time that a hypervisor took away counts as busy."""
    text = _read(Path("/proc/stat"))
    if text is None:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, wait, irq, soft, steal = (int(field) / ticks for field in text.split()[1:9])
    busy = user + nice + system + irq + soft + steal
    return CpuSeconds(busy, busy + idle + wait)


def frequency() -> float | None:
    """Mean clock of all processors now, in Hz; None where the kernel tells none, as in most virtual machines."""
    found = [_number(_read(path)) for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    known = [1000.0 * value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def throttled() -> int | None:
    """How often the processors were slowed down by heat since the start; None where the kernel does not count."""
    found = [_number(_read(path)) for path in CPUS.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")]
    known = [value for value in found if value is not None]
    return sum(known) if known else None


def revision() -> str | None:
    """The commit of the source tree that this runs from, by reading git's files; None in an installed package."""
    git = Path(__file__).resolve().parents[2] / ".git"
    head = _read(git / "HEAD")
    if head is None or not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    packed = (_read(git / "packed-refs") or "").splitlines()
    listed = next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    return _read(git / name) or listed


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor's lines; {} where there are none."""
    text = _read(Path("/proc/cpuinfo")) or ""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _isa(linux: dict[str, str]) -> list[str] | None:
    words = (linux.get("flags") or linux.get("Features") or "").split()
    if words:
        return [ours for theirs, ours in ISA.items() if theirs in words]
    found = [ours for name, ours in MAC_ISA.items() if _sysctl(name) == "1"]
    return found or None


def _physical_cores(linux: dict[str, str]) -> int | None:
    siblings = {_read(path) for path in CPUS.glob("cpu[0-9]*/topology/thread_siblings_list")} - {None}
    return len(siblings) or _number(linux.get("cpu cores"))


def ram() -> int | None:
    """Bytes of physical memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _limit_of_groups() -> int | None:
    """What the control groups that this process is in allow, in bytes; None for no limit."""
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    found = [_number(_read(folder / names[version])) for version, folder in parents(change=False)]
    most = ram()
    return min((value for value in found if value is not None and (most is None or value < most)), default=None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sysctl(name: str) -> str | None:
    if sys.platform != "darwin":
        return None
    import subprocess

    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
