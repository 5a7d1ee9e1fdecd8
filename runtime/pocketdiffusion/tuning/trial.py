"""Measures one graph in a child process: its times, the memory it takes, and how far it is from the golden outputs.

A fresh process has nothing else in its memory, and one that asks for too much dies alone: the parent watches its
resident set and ends it at a limit. Memory is read from /proc. Where an engine keeps compiled graphs, what counts is an
opening from there: a first child fills the cache for a second one.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pocketdiffusion import bands, errors, memory
from pocketdiffusion.backends import Choice, load
from pocketdiffusion.backends.session import label
from pocketdiffusion.children import answer, ending, possible, program, start
from pocketdiffusion.component import Component
from pocketdiffusion.components import pieces
from pocketdiffusion.errors import BackendError, GraphFailed, LoadCrashed, PocketDiffusionError
from pocketdiffusion.golden import golden_tensors, sqnr_db
from pocketdiffusion.timing import Timings
from pocketdiffusion.tuning.footprint import Footprint, Memory, Subject
from pocketdiffusion.tuning.shapes import random_feeds

SECONDS = 3.0
"""Of runs after the first, as far as they go on at all."""
RUNS = 5
"""At most so many of them."""
PATIENCE = 1800.0
"""Seconds after which a child is given up."""
WATCH = 0.02
"""Seconds between looks at a child's memory."""
KILLED = -9
"""How a process ends that its parent did not kill: Linux does it to one that takes more than there is, or than its
control group allows."""
_CHILD = program("pocketdiffusion.tuning.trial")
_KINDS = ("GraphFailed", "BackendUnavailable", "DeviceNotAttached")
"""Errors that arrive as they are; others arrive as GraphFailed."""


class TooLarge(BackendError):
    """A graph needed more memory than a child was given."""


def measure(subject: Subject, *, golden: Path | None = None, limit: int | None = None) -> Footprint:
    """The footprint of a subject. `golden` is the bundle's file of golden tensors, `limit` the child's memory in bytes.

    Raises TooLarge, GraphFailed and other BackendErrors as an opening does, LoadCrashed when the child died.
    """
    found, cached = _measured(subject, golden, limit)
    if found.kept is not None and not cached:
        found, _ = _measured(subject, golden, limit)
    return found


def _measured(subject: Subject, golden: Path | None, limit: int | None) -> tuple[Footprint, bool]:
    """The footprint, and whether the graph came from the engine's cache."""
    if not possible():
        raise LoadCrashed(label(subject.graph), "can't be measured in a child process, which a frozen program lacks")
    task = {"path": sys.path, "subject": subject.to_json(), "golden": None if golden is None else str(golden)}
    with start(_CHILD) as process:
        try:
            assert process.stdin is not None and process.stdout is not None  # they are pipes
            process.stdin.write(json.dumps(task).encode())
            process.stdin.close()
            _watch(process, subject, limit)
            said = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode == KILLED:
        raise TooLarge(f"{subject} was ended by the system, as it does where memory runs out")
    if process.returncode or not said:
        raise LoadCrashed(
            label(subject.graph), f"ended a measuring process with {ending(process.returncode)}: {subject}"
        )
    found = json.loads(said)
    if "error" in found:
        kind = getattr(errors, found["error"]) if found["error"] in _KINDS else GraphFailed
        raise kind(found["text"])
    return Footprint.from_json(found["footprint"]), found["cached"]


def _watch(process: subprocess.Popen[bytes], subject: Subject, limit: int | None) -> None:
    """Wait for a child's end. Raises TooLarge and LoadCrashed."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            process.wait(PATIENCE if limit is None else WATCH)
            return
        except subprocess.TimeoutExpired:
            now = None if limit is None else memory.read(process.pid)
            if limit is not None and now is not None and now.peak > limit:
                raise TooLarge(f"{subject} takes more than {limit / 1e6:,.0f} MB") from None
            if time.monotonic() > until:
                raise LoadCrashed(
                    label(subject.graph), f"was not measured within {PATIENCE:.0f} s: {subject}"
                ) from None


def child(task: Mapping[str, Any]) -> None:
    """The child's side: one line of JSON on stdout."""
    say = answer()
    memory.give_way()
    golden = None if task["golden"] is None else Path(task["golden"])
    try:
        footprint, cached = _trial(Subject.from_json(task["subject"]), golden)
    except (PocketDiffusionError, MemoryError) as error:
        say(json.dumps({"error": type(error).__name__, "text": str(error) or "out of memory"}))
    else:
        say(json.dumps({"footprint": footprint.to_json(), "cached": cached}))


def _trial(subject: Subject, golden: Path | None) -> tuple[Footprint, bool]:
    backend = load(subject.backend)
    loading = _seconds(backend.version)
    gauge = _Gauge()
    component = _component(subject)
    component.expect(subject.shapes)
    opening = 0.0 if subject.bands is not None else _seconds(lambda: component.session)
    opened = gauge.take()
    feeds = random_feeds(subject.entry.inputs, subject.shapes)
    first, others = _runs(
        functools.partial(component.run, feeds)
        if subject.bands is None
        else functools.partial(bands.run, component, feeds, subject.bands, Timings())
    )
    ran = gauge.take()
    used = component if subject.bands is None else component.bands[0]
    precision, cached, kept = used.precision, used.cached, used.kept
    error = None if golden is None else _error(component, golden)
    component.close()
    left = gauge.take()
    found = None
    if opened is not None and ran is not None and left is not None:
        found = Memory(*opened[:2], *ran[:2], left=left[1], code=ran[2])
    footprint = Footprint(
        loading=loading,
        opening=opening,
        first=first,
        run=statistics.median(others or [first]),
        precision=precision,
        memory=found,
        sqnr_db=error,
        kept=None if kept is None else str(kept),
    )
    return footprint, cached


def _component(subject: Subject) -> Component:
    entry, options, made = subject.entry, subject.options, list[Component]()
    if subject.bands is not None:
        folder = subject.graph.parents[len(PurePosixPath(entry.graph).parts) - 1]
        made = pieces(subject.component, entry, folder, Choice(subject.backend, subject.device, "measured"), options)
    return Component(
        subject.component,
        subject.graph,
        entry,
        backend=load(subject.backend),
        device=subject.device,
        options=options,
        residency="stream" if subject.streamed else "keep",
        bands=made,
    )


def _runs(run: Callable[[], object]) -> tuple[float, list[float]]:
    """Seconds of the first run, and of those after it."""
    first = _seconds(run)
    others: list[float] = []
    while len(others) < RUNS and sum(others) + min(others, default=first) < SECONDS:
        others.append(_seconds(run))
    return first, others


class _Gauge:
    """Memory above what there was when it was made."""

    def __init__(self) -> None:
        self._code, now = memory.code(), memory.read()
        self._base = 0 if now is None else now.rss - self._code
        memory.reset_peak()

    def take(self) -> tuple[int, int, int] | None:
        """Peak since the last time, what is held now, and by how much programs' code grew; None if nothing tells."""
        now, code = memory.read(), memory.code()
        if now is None or not memory.reset_peak():
            return None
        held = now.rss - code - self._base
        return max(held, now.peak - code - self._base), max(0, held), max(0, code - self._code)


def _error(component: Component, golden: Path) -> float | None:
    feeds, expected = golden_tensors(golden, component.name)
    if not expected:
        return None
    outputs = component.run(feeds)
    return min(sqnr_db(value, outputs[name]) for name, value in expected.items())


def _seconds(work: Callable[[], object]) -> float:
    """What a call takes. Its result does not outlive it: an engine's output may hold all of an arena."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
