"""What a measured process tells while it runs: a file of JSON lines, each written at once, so that a kill loses none.

::

    {"event": "begin", "name": "step", "at": 12.3}                     where it is, should it be killed
    {"event": "span", "name": "step", "start": 12.3, "end": 13.4}
    {"event": "configuration", "configuration": {"device": "…"}}       what is really used
    {"event": "picture", "path": "…"}
    {"event": "done", "at": 20.0, "peak_rss": 123456789}               the last line; "at" and "peak_rss" may be missing

Times are `time.perf_counter` seconds, one clock for all processes of a machine; `START` holds the parent's, read just
before it created the process. Openings may run in threads, everything else tells of the main thread.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

START = "POCKETDIFFUSION_BENCH_START"
OPENING = "open:"
"""Spans of openings, which may overlap others, are called "open:<component>"."""


class EventLog:
    """Writes events. May be used from several threads."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def begin(self, name: str) -> None:
        """A stage, or an opening, begins now."""
        self._write("begin", name=name, at=time.perf_counter())

    def span(self, name: str, start: float, end: float) -> None:
        """Something took from `start` to `end`."""
        self._write("span", name=name, start=start, end=end)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Tell beginning and span of a block; the span only if it ends without an error."""
        self.begin(name)
        start = time.perf_counter()
        yield
        self.span(name, start, time.perf_counter())

    def configuration(self, used: Mapping[str, Any]) -> None:
        """What is really used."""
        self._write("configuration", configuration=dict(used))

    def picture(self, path: Path) -> None:
        """A picture was saved."""
        self._write("picture", path=str(path))

    def done(self, peak_rss: int | None) -> None:
        """All was made; `peak_rss` is the kernel's maximum for this process, in bytes."""
        self._write("done", at=time.perf_counter(), peak_rss=peak_rss)

    def _write(self, event: str, **values: Any) -> None:
        os.write(self._file, (json.dumps({"event": event, **values}) + "\n").encode())


class Interval(NamedTuple):
    """A span in `perf_counter` seconds."""

    name: str
    start: float
    end: float


@dataclass(slots=True)
class Events:
    """What was told before the process ended."""

    spans: list[Interval] = field(default_factory=list)
    configuration: dict[str, Any] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    done: bool = False
    done_at: float | None = None
    """None where the process did not tell."""
    peak_rss: int | None = None
    begun: list[str] = field(default_factory=list)
    """Names in the order of their beginning, without those that ended."""

    @property
    def place(self) -> str | None:
        """Where the process was at its end: openings under way and the latest stage; None for after `done`."""
        if self.done:
            return None
        openings = [name for name in self.begun if name.startswith(OPENING)]
        stages = [name for name in self.begun if not name.startswith(OPENING)]
        return ", ".join([*openings, *stages[-1:]]) or "start"


def read_events(path: Path) -> Events:
    """All whole lines of a file; no file is no events. A last line that a kill cut off is left out.

    Raises ValueError for anything but events.
    """
    found = Events()
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if line.endswith(b"\n"):
            try:
                _add(found, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"an event that can't be read: {line[:200]!r} ({error})") from None
    return found


def _add(found: Events, event: Mapping[str, Any]) -> None:
    match event["event"]:
        case "begin":
            found.begun.append(event["name"])
        case "span":
            found.spans.append(Interval(event["name"], event["start"], event["end"]))
            if event["name"] in found.begun:
                found.begun.remove(event["name"])
        case "configuration":
            found.configuration |= event["configuration"]
        case "picture":
            found.pictures.append(Path(event["path"]))
            found.begun.clear()  # a stage may begin more often than it ends: one that runs two graphs
        case "done":
            found.done, found.done_at, found.peak_rss = True, event.get("at"), event.get("peak_rss")
