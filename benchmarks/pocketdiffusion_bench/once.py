"""Folders that a command makes once: kept in the cache folder, below "bench", where they may be deleted.

Limit: what two processes make at the same time is made twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pocketdiffusion.bundle.paths import cache_dir
from pocketdiffusion_bench.errors import BenchError


def make_once(name: str, key: Sequence[str], command: Callable[[Path], Sequence[str]]) -> Path:
    """The folder that a command makes, unless it is there already; `command` gives it for the folder to write.

    `key` is all that the content depends on. Folders of the same name with another key are outdated and removed. The
    command's stderr is shown as it comes. Raises BenchError with its last line when it fails; then nothing is kept.
    """
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    folder = cache_dir() / "bench" / "models" / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    print(f"making {folder}; this is done once", file=sys.stderr, flush=True)
    with _part(folder) as part:
        run_tool(command(part), f"{name} can't be made")
        if not folder.is_dir():  # another process may have been faster
            os.replace(part, folder)
    for old in folder.parent.glob(f"{name}-{'?' * len(digest)}"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def run_tool(command: Sequence[str], failure: str) -> None:
    """Run a command to its end and show its stderr. Raises BenchError: `failure` and the last line that says why."""
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        for line in child.stderr or ():
            sys.stderr.write(line)
            lines.append(line.strip())
    if child.returncode != 0:
        said = [line for line in lines if line and not line.startswith(("[notice]", "WARNING"))]
        errors = [line for line in said if line.lower().startswith("error")]
        raise BenchError(f"{failure}: {(errors or said or [f'exit code {child.returncode}'])[-1]}")


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """A hidden place beside `folder` that this process writes to; what killed processes left there is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = f".{folder.name}.part-"
    for left in folder.parent.glob(f"*{start}*"):
        if not _runs(left.name.partition(start)[2].partition(".")[0]):
            shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f"{start}{os.getpid()}")
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _runs(process: str) -> bool:
    """Whether a process is alive; where that can't be told, it counts as so."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
