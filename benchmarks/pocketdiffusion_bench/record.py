"""What was found: one record for each case, written as one line of JSON.

Seconds are wall time, bytes are bytes, and raw samples are always kept. None stands for "could not be read here", never
for zero. `schema.json` describes the same in JSON Schema; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pocketdiffusion_bench.case import Case

SCHEMA_VERSION = 1

OK, FAILED, KILLED, UNAVAILABLE = "ok", "failed", "killed", "unavailable"
"""States of a record: measured; ended with an error; killed by its memory limit; the peer can't be installed here."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a run, in seconds since the process was created.

    One after another: "python" (until the first line of the program), "import", "load" (reading the model; with
    everything in it, where a peer does not tell its parts), "prepare" (until prompts are read), "tokenise", "wait_open"
    (for a graph that is still being opened), "text_encode", "vae_encode", "step" ("uneven_step" where a preset leaves
    out work in some), "vae_decode", "close" (of a graph, between these), "convert" (to a picture), "save", "end" (until
    the process is gone). Apart from these: "open:<component>", which may overlap others, and "image", which encloses
    what belongs to one picture.
    """

    name: str
    start: float
    seconds: float


@dataclass(frozen=True, slots=True)
class MemoryPeaks:
    """Bytes."""

    rss: int | None = None
    """Largest resident set: the kernel's own maximum, so that no peak is lost between samples."""
    anonymous: int | None = None
    """Largest sampled anonymous part: what a program allocated."""
    file: int | None = None
    """Largest sampled file-backed part: mapped weights and libraries, which the system can drop."""
    pss: int | None = None
    """Largest sampled proportional set: shared pages count by their share."""
    cgroup: int | None = None
    """The control group's own maximum, page cache included."""


@dataclass(frozen=True, slots=True)
class Run:
    """One fresh process."""

    seconds: float
    """From just before the process was created to its end."""
    spans: tuple[Span, ...]
    memory: MemoryPeaks
    stages: Mapping[str, MemoryPeaks] = field(default_factory=dict)
    """Span name -> largest sampled values while it ran."""
    joules: float | None = None
    energy_source: str | None = None
    """Which meter, e.g. "rapl:package-0"; None where none can be read."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How near a case's picture is to the float32 reference's of the same model, seed and settings."""

    reference: str
    """What it was compared with, as a case's label."""
    psnr_db: float | None = None
    """At most 99, which stands for equal pictures."""
    ssim: float | None = None
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    """Component -> SQNR of one pass against torch float32, from the bundle's manifest."""
    random_weights: bool = False
    """Whether the weights are random, so that pictures mean nothing."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Arithmetic done against what the machine can do."""

    flops_per_step: float
    """Multiplications and additions of one step, counted from the graph."""
    achieved: float
    """FLOP/s of the median step."""
    peak: float
    """FLOP/s of the matrix-product probe in the case's precision."""
    probe: str
    """Which probe, e.g. "float32 2048x2048x2048"."""

    @property
    def share(self) -> float:
        """Achieved over peak."""
        return self.achieved / self.peak


@dataclass(frozen=True, slots=True)
class Record:
    """One case with everything measured on it."""

    case: Case
    status: str
    """One of `OK`, `FAILED`, `KILLED`, `UNAVAILABLE`."""
    started: str
    """UTC, ISO 8601."""
    machine: Mapping[str, Any]
    """See `machine.describe`."""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """What was really used, as the measured process says: engine, version, device, precision, threads, bundle hash."""
    runs: tuple[Run, ...] = ()
    quality: Quality | None = None
    rate: Rate | None = None
    flags: tuple[str, ...] = ()
    """What makes the figures doubtful, in sentences: a busy machine, a spread over 3 %."""
    error: str | None = None
    schema: int = SCHEMA_VERSION

    def samples(self, name: str) -> list[float]:
        """Seconds of all spans of one name, over all runs."""
        return [span.seconds for run in self.runs for span in run.spans if span.name == name]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The value that `to_json` wrote."""
        runs = tuple(
            Run(
                **{
                    **run,
                    "spans": tuple(Span(**span) for span in run["spans"]),
                    "memory": MemoryPeaks(**run["memory"]),
                    "stages": {name: MemoryPeaks(**peaks) for name, peaks in run["stages"].items()},
                }
            )
            for run in data["runs"]
        )
        parts = {"quality": Quality, "rate": Rate}
        made = {name: kind(**data[name]) if data[name] else None for name, kind in parts.items()}
        case = Case.from_json(data["case"])
        return cls(**{**data, "case": case, "runs": runs, "flags": tuple(data["flags"]), **made})
