"""A hard limit on a process's memory, without swap, and the peak that its control group saw.

Linux's control groups count what a process really uses, page cache included, and kill it when it can't be made to use
less: version 2 and version 1 are tried, below the group that this process is in. Writing there needs to be root, or a
delegated group: `systemd-run --user --scope -p Delegate=yes pocketdiffusion bench …`. Where neither works, a limit
becomes RLIMIT_DATA, which is another thing, and the record's flags say so.

Page cache belongs to the group whose process read a file first. The model's files are therefore dropped from the cache
before a limited run (`forgotten`), or they would cost it nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pocketdiffusion_bench.errors import BenchError

DATA_LIMIT_NOTE = (
    "no control group may be made here, so the memory limit is RLIMIT_DATA: it counts private memory that was asked "
    "for, touched or not, and no file-mapped weights; for a true limit be root, or start with "
    "`systemd-run --user --scope -p Delegate=yes`"
)
CHUNK = 1 << 20
_NUMBER = itertools.count()


class Group(Protocol):
    """Where a measured process runs."""

    note: str | None
    """What makes its limit something else than a limit of memory."""

    def command(self, command: Sequence[str]) -> list[str]:
        """The same process, which goes into the group before it does anything else."""
        ...

    def peak(self) -> int | None:
        """Bytes; None where it can't be read."""
        ...

    def killed(self) -> bool:
        """Whether the limit ended a process."""
        ...

    def close(self) -> None:
        """Remove it; its processes must have ended."""
        ...


class ControlGroup:
    """A fresh control group, of version 1 or 2 by the names of its files."""

    note: str | None = None

    def __init__(self, folder: Path, limit: int | None, *, version: int) -> None:
        self.folder, self._version = folder, version
        folder.mkdir()
        try:
            if not (folder / self._name("memory.max", "memory.limit_in_bytes")).exists():
                raise OSError(f"{folder} has no memory controller")
            if limit is not None:
                self._limit(limit)
        except OSError:
            folder.rmdir()
            raise

    def _name(self, second: str, first: str) -> str:
        return second if self._version == 2 else first

    def _limit(self, limit: int) -> None:
        (self.folder / self._name("memory.max", "memory.limit_in_bytes")).write_text(str(limit))
        swap = self.folder / self._name("memory.swap.max", "memory.memsw.limit_in_bytes")
        if swap.exists():  # kernels without swap accounting have none
            swap.write_text("0" if self._version == 2 else str(limit))

    def command(self, command: Sequence[str]) -> list[str]:
        """By a shell that moves itself: moved by its parent, a process might allocate before."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    def peak(self) -> int | None:
        """The kernel's own maximum; version 2 tells it since Linux 5.19."""
        try:
            return int((self.folder / self._name("memory.peak", "memory.max_usage_in_bytes")).read_text())
        except OSError:
            return None

    def killed(self) -> bool:
        """By the kernel's counter of kills."""
        try:
            text = (self.folder / self._name("memory.events", "memory.oom_control")).read_text()
        except OSError:
            return False
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        return found is not None and int(found[1]) > 0

    def close(self) -> None:
        """Remove it, unless a grandchild still runs in it."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class DataLimit:
    """RLIMIT_DATA, or nothing."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self.note = None if limit is None else DATA_LIMIT_NOTE

    def command(self, command: Sequence[str]) -> list[str]:
        """By a shell that limits itself; memory that is asked for beyond is refused."""
        if self._limit is None:
            return list(command)
        return ["/bin/sh", "-c", 'ulimit -d "$0" && exec "$@"', str(self._limit // 1024), *command]

    def peak(self) -> int | None:
        """It counts nothing."""
        return None

    def killed(self) -> bool:
        """It kills nothing."""
        return False

    def close(self) -> None:
        """Nothing is left behind."""


def make_group(limit: int | None) -> Group:
    """The best group that can be made here. Raises BenchError for a limit on a system that has none."""
    name = f"pocketdiffusion-bench-{os.getpid()}-{next(_NUMBER)}"
    for version, parent in parents():
        with contextlib.suppress(OSError):
            return ControlGroup(parent / name, limit, version=version)
    if limit is not None and sys.platform != "linux":
        raise BenchError(f"a memory limit was asked for; it needs Linux, and this is {sys.platform}: leave it out")
    return DataLimit(limit)


def parents(proc: Path = Path("/proc/self"), *, change: bool = True) -> Iterator[tuple[int, Path]]:
    """(version, folder) of the groups that this process is in and that count memory.

    With `change`, only those below which groups can count it too, which may take a change (see `_delegates`).
    """
    try:
        own, mounts = (proc / "cgroup").read_text(), (proc / "mountinfo").read_text()
    except OSError:
        return
    for line in own.splitlines():
        _, controllers, place = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 2 or "memory" in controllers.split(","):
            folder = _mounted(mounts, version, place)
            if folder is not None and (version == 1 or not change or _delegates(folder)):
                yield version, folder


def _mounted(mounts: str, version: int, place: str) -> Path | None:
    """The folder of a group. In a container only a part of the tree is mounted, of which `place` may know nothing."""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if kind == ("cgroup2" if version == 2 else "cgroup") and (version == 2 or "memory" in options.split(",")):
            below = place.removeprefix(root.rstrip("/")).lstrip("/")
            folder = Path(point) / below
            return folder if folder.is_dir() else Path(point)
    return None


def _delegates(folder: Path) -> bool:
    """Whether groups below a version 2 group count memory, after asking for it.

    A group that shares out memory may hold no processes itself: if this process is the only one in it, it steps aside
    into a group of its own.
    """
    control, processes = folder / "cgroup.subtree_control", folder / "cgroup.procs"
    try:
        if "memory" in control.read_text().split():
            return True
        if "memory" not in (folder / "cgroup.controllers").read_text().split():
            return False
        if processes.read_text().split() == [str(os.getpid())]:
            aside = folder / "pocketdiffusion-bench"
            aside.mkdir(exist_ok=True)
            (aside / "cgroup.procs").write_text(str(os.getpid()))
        control.write_text("+memory")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def forgotten(folder: Path) -> Iterator[None]:
    """Without a model's files in the page cache, as far as no other process has them mapped; they are there after."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if hasattr(os, "posix_fadvise"):
        for file in files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        yield
    finally:
        for file in files:  # another case's process must not find them gone
            with file.open("rb", buffering=0) as opened:
                while opened.read(CHUNK):
                    pass
