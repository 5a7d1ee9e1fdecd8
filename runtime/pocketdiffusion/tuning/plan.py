"""Composes the peak of a whole generation from footprints, and finds the fastest way that keeps a memory limit.

The peak is what the process has before, the engines' code, what is held of the stages so far, and the largest moment of
the one at work. Ways are tried in an order, and only what a verdict needs is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from pocketdiffusion import memory
from pocketdiffusion.component import Residency
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.tuning.footprint import Memory, Subject
from pocketdiffusion.tuning.footprints import Footprints, Say
from pocketdiffusion.units import megabytes

MARGIN = 1.05
"""A prediction must fit this many times: measurements of one thing differ by some percent."""
ROUND = 10_000_000
"""A limit that is proposed is a multiple of this."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a generation is held in memory."""

    residency: Residency = "keep"
    """See `component.Residency`."""
    compact: bool = False
    """Weights as they are stored, where the pipeline would not hold them so anyway."""
    batched: bool = True
    """The passes of guidance in one batch; False: in turn."""
    tile: int | None = None
    """The VAE computes at most this many pixels squared at a time."""
    bands: int | None = None
    """The VAE's decoder computes this many rows at a time."""
    tiny: bool = False
    """The tiny decoder in place of the full one, which it does not equal."""

    def __str__(self) -> str:
        parts = [RESIDENCIES[self.residency]]
        parts += ["weights held compact"] if self.compact else []
        parts += [] if self.batched else ["guidance in turn"]
        parts += [] if self.tile is None else [f"VAE in tiles of at most {self.tile}x{self.tile} pixels"]
        parts += [] if self.bands is None else [f"VAE in bands of {self.bands} rows"]
        parts += ["the tiny decoder, which draws less detail"] if self.tiny else []
        return ", ".join(parts)


Decoder = tuple[int | None, int | None, bool]
"""`tile`, `bands` and `tiny` of a strategy."""

RESIDENCIES: dict[Residency, str] = {
    "keep": "graphs stay open",
    "release": "one graph at a time",
    "stream": "one graph at a time, the denoiser in parts",
}
"""The fastest first, in words."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One graph at work."""

    subject: Subject
    kept: bool
    """Whether it stays open until the end."""
    extra: int = 0
    """Bytes that the runtime itself takes meanwhile: for pictures."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was chosen for a request."""

    strategy: Strategy
    predicted: int
    """Bytes of the process at its peak."""
    limit: int

    def __str__(self) -> str:
        peak = f"{megabytes(self.predicted)} at the peak of {megabytes(self.limit)} allowed"
        return f"memory plan: {self.strategy}; predicted {peak}"


def strategies(
    residencies: Sequence[Residency],
    compact: Sequence[bool],
    batched: Sequence[bool],
    decoders: Sequence[Decoder],
) -> list[Strategy]:
    """All combinations, what costs least first: guidance in turn, then reopening, compact weights, and in the end the
    decoders in their order.
    """
    return [Strategy(r, c, b, *d) for d, c, r, b in product(decoders, compact, residencies, batched)]


def predicted(stages: Sequence[Stage], found: Mapping[str, Memory], base: int) -> int:
    """The peak in bytes of a process that has `base` now; stages that are not `found` (by `identity`) count nothing."""
    held, peak, code = 0, 0, dict[str, int]()
    for stage in stages:
        known = found.get(identity(stage.subject))
        if known is not None:
            peak = max(peak, held + stage.extra + max(known.opening, known.running))
            held += known.ran if stage.kept else known.left
            code[stage.subject.backend] = max(known.code, code.get(stage.subject.backend, 0))
    return base + sum(code.values()) + peak


def identity(subject: Subject) -> str:
    """Equal for subjects with the same footprint."""
    return repr(sorted(subject.key().items()))


class Planner:
    """Finds plans for one process. `say` is told before something is measured."""

    def __init__(self, footprints: Footprints, say: Say) -> None:
        self._footprints, self._say = footprints, say
        self._found: dict[str, Memory] = {}

    def plan(
        self, ways: Sequence[Strategy], stages_of: Callable[[Strategy], Sequence[Stage]], *, base: int, limit: int
    ) -> Plan:
        """The first of `ways`, ordered from the fastest to the leanest, that fits.

        Raises InvalidRequest with the smallest limit that would do, and BackendError where a graph can't be measured.
        """
        for way in ways:
            peak = self._peak(stages_of(way), base, limit)
            if peak is not None:
                return Plan(way, peak, limit)
        raise self._refusal(ways, stages_of, base, limit)

    def _peak(self, stages: Sequence[Stage], base: int, limit: int | None) -> int | None:
        """The prediction; None as soon as it is more than a limit. Small graphs are measured before large ones."""
        for stage in stages:
            self._look_up(stage.subject)
        for stage in sorted(stages, key=lambda stage: stage.subject.graph.stat().st_size):
            if limit is not None and predicted(stages, self._found, base) * MARGIN > limit:
                return None
            if not self._measured(stage.subject, limit):
                return None
        peak = predicted(stages, self._found, base)
        return peak if limit is None or peak * MARGIN <= limit else None

    def _look_up(self, subject: Subject) -> None:
        found = self._footprints.known(subject)
        if found is not None and found.memory is not None:
            self._found[identity(subject)] = found.memory

    def _measured(self, subject: Subject, limit: int | None) -> bool:
        """Whether a subject's footprint is known, if need be by measuring; False where it exceeds the limit."""
        if identity(subject) in self._found:
            return True
        found = self._footprints.of(subject, self._say, limit=limit if limit is not None else memory.available())
        if found is None:
            return False
        if found.memory is None:
            raise unmeasurable()
        self._found[identity(subject)] = found.memory
        return True

    def _refusal(
        self, ways: Sequence[Strategy], stages_of: Callable[[Strategy], Sequence[Stage]], base: int, limit: int
    ) -> InvalidRequest:
        self._peak(stages_of(ways[-1]), base, None)  # the leanest, so that at least its need is known
        peaks = {}
        for way in ways:
            stages = stages_of(way)
            if all(identity(stage.subject) in self._found for stage in stages):
                peaks[way] = predicted(stages, self._found, base)
        start = f"memory_limit is {megabytes(limit)}; this request"
        if not peaks:
            return InvalidRequest("memory_limit", f"{start} needs more than this machine has free: ask for less")
        way = min(peaks, key=peaks.__getitem__)
        needed = -(-int(peaks[way] * MARGIN) // ROUND) * ROUND
        return InvalidRequest(
            "memory_limit",
            f"{start} needs {megabytes(needed)} ({way}): allow {needed // 10**6}MB, or ask for a smaller picture",
        )


def unmeasurable() -> InvalidRequest:
    """For systems that do not tell a process's memory."""
    return InvalidRequest(
        "memory_limit", "a memory limit was asked for; it needs Linux, which tells a process's memory: leave it out"
    )
