"""Which engine, precision and way to hold weights each component is best run with, by measured figures.

The best is the shortest way to a first picture: importing engines, opening graphs, and all their runs. A device is
taken because it was faster, not because it is an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

from pocketdiffusion.backends import AUTO_ORDER
from pocketdiffusion.backends.base import Weights
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.tuning.footprint import Footprint

SAME_DB = 60.0
"""Errors smaller than this, a thousandth of the signal, count as none: engines differ by as much in float32."""
NOISE = 1.05
"""A gain smaller than this is none: the earlier candidate stays."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a component."""

    backend: str
    device: str
    precision: str
    weights: Weights

    @property
    def place(self) -> str:
        """E.g. "openvino:cpu"."""
        return f"{self.backend}:{self.device}"

    def __str__(self) -> str:
        return f"{self.place} {self.precision}" + ("" if self.weights == "fast" else f" {self.weights}")


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a candidate."""

    component: str
    candidate: Candidate
    runs: int
    """How often the component runs for one picture."""
    footprint: Footprint | None
    """None where it failed."""
    error: str | None = None
    """Why."""
    wanted_db: float = 0.0
    """The SQNR against the golden outputs that the candidate must have, see `bounded`."""

    @property
    def seconds(self) -> float:
        """For the first picture of a process: opening and all runs. Infinite where it failed."""
        found = self.footprint
        return float("inf") if found is None else found.opening + found.first + (self.runs - 1) * found.run

    @property
    def refused(self) -> str | None:
        """Why it may not be chosen; None if it may."""
        if self.footprint is None:
            return self.error
        error = self.footprint.sqnr_db
        if error is None or error >= self.wanted_db:
            return None
        return f"{error:.1f} dB, at least {self.wanted_db:.1f} are wanted"

    def to_json(self) -> dict[str, Any]:
        """By name."""
        found = None if self.footprint is None else self.footprint.to_json()
        candidate = {name: getattr(self.candidate, name) for name in Candidate.__slots__}
        rest = {name: getattr(self, name) for name in ("component", "runs", "error", "wanted_db")}
        return {**rest, "candidate": candidate, "footprint": found}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """The value that `to_json` wrote. Raises TypeError or KeyError for anything else."""
        found = None if data["footprint"] is None else Footprint.from_json(data["footprint"])
        return cls(**{**data, "candidate": Candidate(**data["candidate"]), "footprint": found})


def can_be_compact(entry: ComponentEntry) -> bool:
    """Whether "compact" weights are another way to hold a graph's: IR is always held as it is stored."""
    return entry.format == "onnx" and entry.weights != "float32"


def wanted_db(found: Iterable[Footprint], minimum: float | None, max_loss: float) -> float:
    """The SQNR that a choice for a component must have, from footprints of its float32 candidates.

    That is the manifest's `minimum`, and no more than `max_loss` dB below the best of float32, of which at most
    `SAME_DB` count. -inf without golden outputs.
    """
    errors = [footprint.sqnr_db for footprint in found if footprint.sqnr_db is not None]
    best = min(max(errors), SAME_DB) - max_loss if errors else float("-inf")
    return max(best, float("-inf") if minimum is None else minimum) if errors else best


def best(measured: Sequence[Measured]) -> dict[str, Measured] | None:
    """The choice for each component; None where one has no candidate left.

    Every further engine costs its import, so that sets of engines are compared by the sum. Between candidates that are
    about as fast, the first of `AUTO_ORDER` stays, then the first measured.
    """
    allowed = sorted((item for item in measured if item.refused is None), key=lambda item: _rank(item.candidate))
    engines = list(dict.fromkeys(item.candidate.backend for item in allowed))
    chosen: dict[str, Measured] | None = None
    least = float("inf")
    for count in range(1, len(engines) + 1):
        for group in combinations(engines, count):
            found = _fastest([item for item in allowed if item.candidate.backend in group])
            if {item.component for item in measured} == set(found):
                seconds = _seconds(found)
                if seconds * NOISE < least:
                    chosen, least = found, seconds
    return chosen


def _fastest(allowed: Sequence[Measured]) -> dict[str, Measured]:
    chosen: dict[str, Measured] = {}
    for item in allowed:
        if item.component not in chosen or item.seconds * NOISE < chosen[item.component].seconds:
            chosen[item.component] = item
    return chosen


def _seconds(chosen: Mapping[str, Measured]) -> float:
    """For a first picture."""
    loading = {item.candidate.backend: cast(Footprint, item.footprint).loading for item in chosen.values()}
    return sum(loading.values()) + sum(item.seconds for item in chosen.values())


def _rank(candidate: Candidate) -> int:
    order = [(backend, device) for backend, device, _ in AUTO_ORDER]
    place = (candidate.backend, candidate.device.partition(".")[0])
    return order.index(place) if place in order else len(order)
