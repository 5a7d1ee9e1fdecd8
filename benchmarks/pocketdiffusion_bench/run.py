"""Measures cases: each picture-making process is a fresh one, and cases take turns (A B A B), so that a machine that
drifts drifts for all. One round before the others warms up what a machine keeps (files in memory, engines' caches on
disk, clocks); it is not counted, but a case that fails in it is given up.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pocketdiffusion.errors import PocketDiffusionError
from pocketdiffusion_bench import checks, flags, machine, models, peers
from pocketdiffusion_bench.case import OURS, Case
from pocketdiffusion_bench.curve import Curve, memory_curve
from pocketdiffusion_bench.events import Events, Interval, read_events
from pocketdiffusion_bench.limit import forgotten
from pocketdiffusion_bench.memory import by_stage
from pocketdiffusion_bench.process import Ended, run_process
from pocketdiffusion_bench.record import FAILED, KILLED, OK, UNAVAILABLE, Record, Run, Span

Say = Callable[[str], None]
SLOWEST = 10
"""A process that takes this many times as long as without a limit reads the same pages again and again; it is given
up."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure."""

    runs: int = 3
    """Processes that count, for each case."""
    images: int = 2
    """Pictures a process makes: the first is cold, the others are warm. All have the same seed."""
    warm_up: bool = True
    timeout: float = 3600.0
    """Seconds after which a process is given up."""


@dataclass(slots=True)
class Job:
    """A case that is being measured."""

    case: Case
    folder: Path
    """For its events and pictures; its own."""
    bundle: Path | None = None
    """What ours opens; None for a peer."""
    runs: list[Run] = field(default_factory=list)
    configuration: dict[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    """One that it made."""
    status: str = OK
    error: str | None = None
    doubts: list[str] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    _others: list[float | None] = field(default_factory=list)
    _clocks: list[float | None] = field(default_factory=list)
    _throttled: list[int | None] = field(default_factory=list)
    _pictures: set[str] = field(default_factory=set)

    def prepare(self) -> None:
        """Find or make its model, or give it up."""
        self.folder.mkdir()
        try:
            if self.case.peer == OURS:
                self.bundle = models.provide(self.case)
            else:
                peers.require(self.case)
        except peers.PeerUnavailable as error:
            self.status, self.error = UNAVAILABLE, str(error)
        except PocketDiffusionError as error:
            self.status, self.error = FAILED, str(error)

    def go(self, settings: Settings, *, counts: bool) -> Ended:
        """One process. Its figures are kept only if it `counts`, what went wrong always."""
        events_file = self.folder / "events.jsonl"
        events_file.unlink(missing_ok=True)
        self._clocks.append(machine.frequency())
        self._throttled.append(machine.throttled())
        counted = None if self.case.memory_limit is None else self.bundle
        with nullcontext() if counted is None else forgotten(counted):
            ended = run_process(
                self._command(events_file, settings.images), limit=self.case.memory_limit, timeout=settings.timeout
            )
        events = read_events(events_file)
        self._judge(ended, events, settings)
        if self.status == OK and counts:
            self.runs.append(to_run(ended, events))
            self._others.append(ended.others)
            if ended.note is not None and ended.note not in self.doubts:
                self.doubts.append(ended.note)
        return ended

    def record(self) -> Record:
        """What is known so far."""
        doubts = [
            *self.doubts,
            *flags.flags(self.runs),
            *flags.prediction(self.configuration.get("predicted_bytes"), self.runs),
            *flags.busy(self._others),
            *flags.drift(self._clocks, self._throttled),
            *flags.unequal(self._pictures),
        ]
        return Record(
            case=self.case,
            status=self.status,
            started=self.started,
            machine=machine.describe(),
            configuration=self.configuration,
            runs=tuple(self.runs),
            flags=tuple(doubts),
            error=self.error,
        )

    def _command(self, events: Path, images: int) -> list[str]:
        picture = self.folder / "picture.png"
        if self.bundle is None:
            return peers.command(self.case, events=events, image=picture, images=images)
        return child_command(self.case, self.bundle, events=events, image=picture, images=images)

    def _judge(self, ended: Ended, events: Events, settings: Settings) -> None:
        """Whether it did what was asked; `status` and `error` say if not."""
        self.configuration |= events.configuration
        limit = self.case.memory_limit
        if limit is not None and ended.code and (ended.killed or _ran_out(ended)):  # not one whose child was killed
            self.status = KILLED
            self.error = f"killed by its memory limit of {limit / 1e6:,.0f} MB; it was at: {events.place}"
        elif ended.timed_out:
            self.fail(f"not done after {settings.timeout:g} s, and killed; it was at: {events.place}")
        elif ended.code < 0:
            self.fail(f"ended by signal {-ended.code}; it was at: {events.place}")
        elif ended.code or not events.done:
            self.fail(ended.message or f"ended with exit code {ended.code}; it was at: {events.place}")
        elif len(events.pictures) != settings.images:
            self.fail(f"made {len(events.pictures)} pictures instead of {settings.images}")
        else:
            self._look(events)

    def _look(self, events: Events) -> None:
        """At what it made."""
        self.picture = events.pictures[0]
        self._pictures |= {hashlib.sha256(checks.pixels_of(file)).hexdigest() for file in events.pictures}
        wrong = checks.mismatch(self.case, events.configuration) or checks.wrong_size(self.case, self.picture)
        if wrong is not None:
            self.fail(wrong)

    def stop(self, runs: int) -> None:
        """No more will come, though so many `runs` were asked for."""
        if self.status == OK and not self.runs:
            self.fail("interrupted before it was measured")
        elif self.status == OK and len(self.runs) < runs:
            self.doubts.append(f"interrupted after {len(self.runs)} of {runs} runs")

    def fail(self, error: str) -> None:
        """Give the case up."""
        self.status, self.error = FAILED, error


def measure(
    cases: Sequence[Case],
    settings: Settings,
    folder: Path,
    say: Say,
    save: Callable[[Sequence[Job]], None] = lambda jobs: None,
) -> list[Job]:
    """All cases in turns, in the order given. What goes wrong with one is in its job and stops no other.

    `save` gets the jobs when people interrupt it after the first run: they say what is missing.
    """
    jobs = [Job(case, folder / f"case-{number}") for number, case in enumerate(cases)]
    for job in jobs:
        job.prepare()
        if job.error is not None and len(jobs) > 1:  # a single one's error ends the command, which tells it
            say(f"{job.case.label}: {job.error}")
    try:
        for turn in range(0 if settings.warm_up else 1, settings.runs + 1):
            for job in jobs:
                if job.status == OK:
                    line = _attempt(job, settings, turn)
                    if job.status != FAILED or len(jobs) > 1:
                        say(line)
    except (KeyboardInterrupt, SystemExit):
        for job in jobs:
            job.stop(settings.runs)
        if any(job.runs for job in jobs):
            save(jobs)
        raise
    return jobs


def _attempt(job: Job, settings: Settings, turn: int) -> str:
    """One process of a job; what came of it, in a line."""
    name = "warm-up" if turn == 0 else f"run {turn} of {settings.runs}"
    try:
        ended = job.go(settings, counts=turn > 0)
    except (OSError, ValueError) as error:  # no such program; a picture or events that can't be read
        job.fail(" ".join(str(error).split()))
    if job.error is not None:
        return f"{name}: {job.case.label}: {job.error}"
    peak = "" if ended.memory.rss is None else f", {ended.memory.rss / 1e6:,.0f} MB"
    return f"{name}: {job.case.label}: {ended.end - ended.start:.2f} s{peak}"


def measure_curve(job: Job, settings: Settings, say: Say) -> Curve:
    """A measured job's case under ever smaller memory limits, one process each."""
    unlimited = max(run.seconds for run in job.runs)
    once = replace(settings, runs=1, timeout=min(settings.timeout, 30 + SLOWEST * unlimited))

    def attempt(limit: int) -> Record:
        case = replace(job.case, memory_limit=limit)
        limited = Job(case, job.folder.with_name(f"{job.folder.name}-{limit}"), job.bundle)
        limited.folder.mkdir()
        say(_attempt(limited, once, 1))
        return limited.record()

    need = max(run.memory.cgroup or run.memory.rss or 0 for run in job.runs)
    return memory_curve(attempt, need, machine.ram() or need)


def child_command(case: Case, bundle: Path, *, events: Path, image: Path, images: int) -> list[str]:
    """The measured process of ours."""
    command = [sys.executable, "-m", "pocketdiffusion_bench.child", "--case", json.dumps(case.to_json())]
    command += ["--bundle", str(bundle), "--events", str(events), "--image", str(image), "--images", str(images)]
    return command


def to_run(ended: Ended, events: Events) -> Run:
    """A process that made its pictures, in seconds since its creation."""
    last = events.done_at or max((span.end for span in events.spans), default=ended.start)
    spans = sorted([*events.spans, Interval("end", last, ended.end)], key=lambda span: span.start)
    # What a process says of itself is exact; the kernel's word may include the parent's memory (see `process`).
    memory = ended.memory if events.peak_rss is None else replace(ended.memory, rss=events.peak_rss)
    return Run(
        seconds=ended.end - ended.start,
        spans=tuple(Span(span.name, span.start - ended.start, span.end - span.start) for span in spans),
        memory=memory,
        stages=by_stage(ended.samples, spans),
        joules=ended.joules,
        energy_source=ended.energy_source,
    )


def _ran_out(ended: Ended) -> bool:
    """Whether a process whose limit refuses memory, and kills nothing, failed for lack of it."""
    words = ("memory", "bad_alloc", "bad allocation", "alloc")
    return ended.note is not None and (ended.code < 0 or any(word in ended.message.lower() for word in words))
