"""Fewer passes of the denoiser: at most steps its answer is forecast from those at earlier steps.

The forecast is linear in log sigma. At 7 of 25 steps on the embedded model (10 prompts) its pictures came within 36 dB
of the full run's (median), those of EasyCache's adaptive reuse (arXiv:2507.02860) within 29 dB; on recorded answers
Spectrum's Chebyshev fit came out behind, and a quadratic better at some counts and worse at most. Which steps are
computed is fixed before the run, so its cost is known, and an image of a batch is the same as alone.

Limits: a forecast needs two answers, so runs of three steps or fewer compute everything. Samplers that draw noise make
answers that are harder to forecast; those in UNSUITED, which draw the whole state anew, are not for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pocketdiffusion.sampling.types import Denoise, Sigmas
from pocketdiffusion.tensors import Array

FEWEST = 3
"""The first two steps and the last are always computed."""
BEND = 1.35
"""How much closer together the computed steps lie early in the run, where answers turn faster; 1 is evenly."""
UNSUITED = frozenset(("lcm", "tcd"))
"""Samplers for distilled models, whose few steps are all needed."""
SAME_LEVEL = 1 - 1e-9
"""Levels closer than this ratio are one."""


def computed_steps(total: int, count: int) -> list[int]:
    """Which of `total` steps are computed if `count` are to be, at least FEWEST: the first two, the last, some between.

    All of them if there are no more than `count`.
    """
    if total <= count:
        return list(range(total))
    chosen = [0]
    for k in range(count - 1):
        ideal = 1 + (total - 2) * (k / (count - 2)) ** BEND
        chosen.append(max(round(ideal), chosen[-1] + 1))
    return chosen


@dataclass(frozen=True, slots=True)
class Answer:
    """What the denoiser said about one state."""

    step: int
    x: Array
    sigma: float
    denoised: Array


class Forecast:
    """A `Denoise` that runs another one at `count` of the steps and extrapolates at the others. Made for one run.

    `sigmas` are the run's levels. A call between two levels belongs to the step it is in, one at a level to the step
    that starts there, so samplers of several calls a step are served too. `stochastic`: see `extrapolated`.
    """

    def __init__(self, denoise: Denoise, sigmas: Sigmas, count: int, *, stochastic: bool = False) -> None:
        self.ran = 0
        """Calls that ran the denoiser."""
        self.skipped = 0
        """Calls that were forecast."""
        self._denoise = denoise
        self._levels = sigmas[:-1]
        self._computed = frozenset(computed_steps(len(self._levels), count))
        self._past: list[Answer] = []
        self._stochastic = stochastic

    def __call__(self, x: Array, sigma: float) -> Array:
        """The estimate of the clean latent, computed or forecast."""
        step = self._step(sigma)
        if len(self._past) == 2 and step not in self._computed:
            self.skipped += 1
            before, last = self._past
            return extrapolated(before, last, x, sigma, stochastic=self._stochastic)
        self.ran += 1
        denoised = self._denoise(x, sigma)
        # A second answer in one step (a corrector's, a midpoint's) replaces the first: they may be too near for a line.
        others = [answer for answer in self._past if answer.step != step]
        self._past = [*others[-1:], Answer(step, x, sigma, denoised)]
        return denoised

    def _step(self, sigma: float) -> int:
        return max(0, int(np.count_nonzero(self._levels >= sigma * SAME_LEVEL)) - 1)


def extrapolated(before: Answer, last: Answer, x: Array, sigma: float, *, stochastic: bool) -> Array:
    """The estimate of the clean latent at state `x`, from a line in log sigma through what two answers said.

    The line is that of the noise in the state. `stochastic` says that fresh noise was drawn since, of which the answers
    know nothing; then the line is that of v, with which the estimate follows the state as for standard normal data.
    """
    share = math.log(sigma / last.sigma) / math.log(last.sigma / before.sigma)
    older, newer = (_direction(answer, stochastic) for answer in (before, last))
    keep, scale = _scales(sigma, stochastic)
    return np.asarray(keep * x - scale * (newer + share * (newer - older)), np.float32)


def _direction(answer: Answer, stochastic: bool) -> Array:
    keep, scale = _scales(answer.sigma, stochastic)
    return np.asarray((keep * answer.x - answer.denoised) / scale, np.float32)


def _scales(sigma: float, stochastic: bool) -> tuple[float, float]:
    """(a, b) of ``denoised = a x - b direction``: those of eps, or of v."""
    if not stochastic:
        return 1.0, sigma
    unit = 1 / (1 + sigma**2)
    return unit, sigma * math.sqrt(unit)
