"""UniPC: a multistep predictor with a corrector that costs no network call.

Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2 (multistep UniPC, B(h) version, varying B_1 and B_2).
Options as in Diffusers' ``UniPCMultistepScheduler``. The corrector for the state at a level runs when the network has
answered there, at the start of the next step, so a `Step` holds the predicted state. The base of the predictor and of
the corrector is the same and cancels: the correction is an increment, and a state that a consumer has put in the place
of the predicted one keeps its place.

Limit: a last step to sigma 0, or to the level where it starts, is always of order 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from pocketdiffusion.sampling._math import intervals, toward
from pocketdiffusion.sampling._multistep import Answer, choose, log_step, phi
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def unipc(
    denoise: Denoise,
    x: Array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    solver_order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> Iterator[Step]:
    """Deterministic; one network call a step; never draws.

    `solver_order` 1 to 3 (the corrector raises the rate by one). `solver_type` "bh1" (B(h) = h) or "bh2"
    (B(h) = e^h - 1). `predict_x0`: integrate the clean estimate, otherwise the noise estimate. `lower_order_final`: the
    order falls towards the last step. `disable_corrector`: the steps, counted from 0, whose result isn't corrected.
    Raises `InvalidRequest` for another order or type.
    """
    order = choose("unipc", "solver_order", solver_order, (1, 2, 3))
    bh1 = choose("unipc", "solver_type", solver_type, ("bh1", "bh2")) == "bh1"
    total = len(sigmas) - 1
    orders = [min(order, index + 1, total - index if lower_order_final else order) for index in range(total)]
    if sigmas[-1] in (0.0, sigmas[-2]):
        orders[-1] = 1
    answers: list[Answer] = []
    last: _Update | None = None
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        value = denoised if predict_x0 else (x - denoised) / sigma
        correct = last is not None and index - 1 not in disable_corrector
        shift = last.correction(value) if last is not None and correct else None
        answers = [Answer(sigma, value), *answers[:2]]
        last = _Update(answers[: orders[index]], sigma_next, bh1, predict_x0)
        x_next = toward(denoised, x, sigma_next / sigma) + last.prediction()
        if shift is not None:
            # The noise estimate was taken before the correction and doesn't move with it.
            x_next = x_next + (sigma_next / sigma if predict_x0 else 1.0) * shift
        step = Step(index, total, sigma, sigma_next, x_next, denoised)
        yield step
        x = step.x


class _Update:
    """One step's predictor beyond first order, and what the corrector adds when the answer at its end is known."""

    def __init__(self, answers: Sequence[Answer], sigma_next: float, bh1: bool, predict_x0: bool) -> None:
        newest, *older = answers
        h = log_step(newest.sigma, sigma_next)
        self._h = -h if predict_x0 else h
        self._b = self._h if bh1 else math.expm1(self._h)
        self._scale = -self._b * (1.0 if predict_x0 else sigma_next)
        self._value = newest.value
        self._ratios = [log_step(newest.sigma, answer.sigma) / h for answer in older]
        self._slopes = [
            (answer.value - newest.value) / ratio for answer, ratio in zip(older, self._ratios, strict=True)
        ]

    def prediction(self) -> Array | float:
        """What the predictor adds to the first-order step (UniP, algorithm 2)."""
        return self._combine(self._predictor_weights())

    def correction(self, value: Array) -> Array:
        """Corrected minus predicted state, from the answer `value` at the step's end (UniC, algorithm 1)."""
        *corrector, last = self._corrector_weights()
        change = [c - p for c, p in zip(corrector, self._predictor_weights(), strict=True)]
        return self._scale * last * (value - self._value) + self._combine(change)

    def _combine(self, weights: Sequence[float]) -> Array | float:
        total: Array | float = 0.0
        for weight, slope in zip(weights, self._slopes, strict=True):
            total = total + self._scale * weight * slope
        return total

    def _predictor_weights(self) -> list[float]:
        if len(self._ratios) == 1:
            return [0.5]  # the authors' choice for one ratio: free of h and exact to the method's order
        return self._solve(self._ratios)

    def _corrector_weights(self) -> list[float]:
        return self._solve([*self._ratios, 1.0]) if self._ratios else [0.5]

    def _solve(self, ratios: Sequence[float]) -> list[float]:
        """Weights that make the method exact for polynomials up to the number of ratios."""
        powers = range(1, len(ratios) + 1)
        rows = [[ratio ** (k - 1) for ratio in ratios] for k in powers]
        target = [(phi(k, self._h) * math.factorial(k) - 1.0) / self._b for k in powers]
        return [float(weight) for weight in np.linalg.solve(np.array(rows), np.array(target))] if rows else []
