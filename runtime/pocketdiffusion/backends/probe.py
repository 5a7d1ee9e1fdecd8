"""Tries graphs in a child process first, so that an engine that dies or hangs on a hostile file takes nothing with it.

For graphs whose origin nothing vouches for. The child opens each graph and runs it once, on zeros and on the smallest
sizes that it takes; an ordinary refusal there ("this size does not fit") is no verdict. Where the system has them, the
child has limits: no core dump, processor time, and on a CPU device memory (as much as the machine has).

Limits: this is protection from crashes, not a sandbox: an engine that a file takes over acts with the user's rights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketdiffusion import errors
from pocketdiffusion.backends import load
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.session import label
from pocketdiffusion.children import answer, ending, possible, program, start
from pocketdiffusion.errors import BackendError, GraphFailed, LoadCrashed
from pocketdiffusion.tensors import AnyArray, TensorSpec

BASE_SECONDS = 60.0
BYTES_PER_SECOND = 10e6
"""How slowly a graph may open before it counts as hanging."""

_CHILD = program("pocketdiffusion.backends.probe")
_AXIS = 8
"""A free axis, but the first, which is 1: fits networks of up to four levels and any text encoder."""
_KINDS = ("GraphFailed", "BackendUnavailable", "DeviceNotAttached")


@dataclass(frozen=True, slots=True)
class Trial:
    """One graph and what is to open it."""

    graph: Path
    backend: str
    device: str
    options: SessionOptions


def probe(trials: Sequence[Trial], *, seconds: float | None = None) -> None:
    """Open and run graphs in a child process. `seconds` is for all together; by default it grows with their sizes.

    Raises LoadCrashed when the child died or hung, BackendError as `Backend.open` does.
    """
    if not possible():
        raise LoadCrashed(
            label(trials[0].graph), "can't be tried in a child process, which a frozen program lacks; export the model"
        )
    limit = (
        BASE_SECONDS + sum(_bytes(trial.graph) for trial in trials) / BYTES_PER_SECOND if seconds is None else seconds
    )
    listed = [{**asdict(trial), "graph": str(trial.graph)} for trial in trials]
    task = {"path": sys.path, "seconds": limit, "trials": listed}
    with start(_CHILD) as process:
        try:
            said, _ = process.communicate(json.dumps(task).encode(), timeout=limit)
            end = f"made the engine end with {ending(process.returncode)}"
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            end = f"kept the engine busy for {limit:.0f} s without an answer"
        except BaseException:
            process.kill()
            raise
    _judge(trials, said, end)


def _judge(trials: Sequence[Trial], said: bytes, end: str) -> None:
    """The child wrote one line before each graph, and one at the end: an error's class and text, or nothing."""
    lines = said.decode("utf-8", "replace").split("\n")
    started = [line for line in lines if line.startswith("try ")]
    if "ok" in lines:
        return
    for line in lines:
        kind, _, text = line.removeprefix("error ").partition(" ")
        if line.startswith("error ") and kind in _KINDS:
            raise getattr(errors, kind)("".join(char if char.isprintable() else "?" for char in text))
    trial = trials[min(max(len(started), 1), len(trials)) - 1]
    raise LoadCrashed(
        label(trial.graph), f"{end} ({trial.backend}:{trial.device}); the file is damaged or hostile: fetch it again"
    )


def _bytes(graph: Path) -> int:
    """Of the graph and all weights that lie beside it."""
    return sum(file.stat().st_size for file in graph.parent.iterdir() if file.is_file())


def child(task: Mapping[str, Any]) -> None:
    """The child's side: one line on stdout before each graph, then "ok" or "error <class> <text>"."""
    say = answer()
    trials = [
        Trial(Path(item["graph"]), item["backend"], item["device"], SessionOptions(**item["options"]))
        for item in task["trials"]
    ]
    _limit(float(task["seconds"]), memory=all(trial.device == "cpu" for trial in trials))
    for trial in trials:
        say(f"try {trial.graph.name}")
        try:
            _try(trial)
        except BackendError as error:
            return say(f"error {type(error).__name__} {error}")
    say("ok")


def _try(trial: Trial) -> None:
    session = load(trial.backend).open(trial.graph, trial.device, trial.options)
    try:
        session.run({name: _zeros(spec) for name, spec in session.inputs.items()})
    except GraphFailed:
        pass  # the sizes were guessed
    finally:
        session.close()


def _zeros(spec: TensorSpec) -> AnyArray:
    sizes: Iterable[int] = (
        axis if isinstance(axis, int) else _AXIS if place else 1 for place, axis in enumerate(spec.shape)
    )
    return np.zeros(tuple(sizes), spec.dtype)


def _limit(seconds: float, *, memory: bool) -> None:
    if sys.platform == "win32":
        return
    import resource

    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(seconds * (os.cpu_count() or 1)) + 1}
    if memory:
        limits[resource.RLIMIT_DATA] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (allowed, hard))
