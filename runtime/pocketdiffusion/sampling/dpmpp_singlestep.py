"""DPM-Solver++ singlestep (Diffusers' class) and its ancestral form "DPM++ 2S a" (A1111's name).

Lu et al. 2022, arXiv:2211.01095, algorithm 1 (2S); Lu et al. 2022, arXiv:2206.00927 (third order, order list).

Limits. `dpmpp_singlestep` restarts a block's higher orders from the block's first state; what a consumer changes in
between enters with the weight that the linear part of the solver gives it. "sde-dpmsolver++" draws independently for
each step of a block, as Diffusers does, so its noise belongs to no single path and the result has too little variance
at few steps; `dpmpp_sde` doesn't.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pocketdiffusion.sampling._math import ancestral, intervals, toward
from pocketdiffusion.sampling._multistep import (
    Answer,
    Weights,
    choose,
    data_weights,
    diffusers_sde_curvature,
    log_step,
    noise_weights,
    slopes,
    update,
)
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")


def dpmpp_singlestep(
    denoise: Denoise,
    x: Array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    solver_order: int = 2,
    solver_type: str = "midpoint",
    algorithm_type: str = "dpmsolver++",
    lower_order_final: bool = False,
) -> Iterator[Step]:
    """One network call a step; a block of `solver_order` steps solves its interval with rising order.

    `solver_order` 1 to 3. `solver_type` "midpoint" or "heun". `algorithm_type` "dpmsolver++", "dpmsolver" or
    "sde-dpmsolver++", which draws once a step but for a step to sigma 0. `lower_order_final`: end with orders below
    `solver_order` also where blocks would fit; where they do not fit, or the last level is 0, that happens anyway, as
    in Diffusers' ``DPMSolverSinglestepScheduler``. Raises `InvalidRequest` for other values.
    """
    name = "dpmpp_singlestep"
    order = choose(name, "solver_order", solver_order, (1, 2, 3))
    heun = choose(name, "solver_type", solver_type, ("midpoint", "heun")) == "heun"
    algorithm = choose(name, "algorithm_type", algorithm_type, ALGORITHMS)
    levels: list[float] = sigmas.tolist()
    orders = singlestep_orders(levels, order, lower_order_final)
    for index, at_order in enumerate(orders):
        sigma, sigma_next = levels[index], levels[index + 1]
        denoised = denoise(x, sigma)
        if at_order == 1:
            block = _Block(sigma, x, denoised)
        block.answers.append(Answer(sigma, (x - denoised) / sigma if algorithm == "dpmsolver" else denoised))
        nodes = block.answers if heun else [*block.answers[:1], *block.answers[1:][-1:]]
        weights = _weights(algorithm, block.sigma, sigma_next, heun or at_order == 3)
        x_next = update(weights, block.x, block.denoised, slopes(nodes), log_step(block.sigma, sigma_next), noise)
        step = Step(index, len(orders), sigma, sigma_next, x_next, denoised)
        yield step
        if step.x is not x_next and sigma_next > 0.0:
            block.x = block.x + (step.x - x_next) / weights.x
        x = step.x


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """A1111's "DPM++ 2S a": the midpoint method on the clean estimate down to the ancestral level, then fresh noise.

    Two network calls and one draw a step; one call and no draw for a step to sigma 0. `eta` scales the share of fresh
    noise, `s_noise` its deviation.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        middle = math.sqrt(sigma * down)
        if down > 0.0:
            denoised = denoise(toward(denoised, x, middle / sigma), middle)
        x_next = toward(denoised, x, down / sigma)
        if up > 0.0:
            x_next = x_next + (s_noise * up) * noise()
        step = Step(index, len(sigmas) - 1, sigma, sigma_next, x_next, denoised)
        yield step
        x = step.x


def singlestep_orders(levels: Sequence[float], order: int, lower_order_final: bool) -> list[int]:
    """Blocks of rising order, e.g. 1 2 3 1 2 3 …, cut so that they fill the steps."""
    steps = len(levels) - 1
    block = list(range(1, order + 1))
    orders = (block * (steps // order + 1))[:steps]
    if levels[-1] == 0.0 or (lower_order_final and steps % order == 0):
        orders[-1] = 1
    return orders


@dataclass(slots=True)
class _Block:
    """Where the current run of rising orders started, and the answers since then."""

    sigma: float
    x: Array
    denoised: Array
    answers: list[Answer] = field(default_factory=list)


def _weights(algorithm: str, sigma: float, sigma_next: float, heun: bool) -> Weights:
    if algorithm == "dpmsolver":
        return noise_weights(sigma, sigma_next, heun=heun)
    if algorithm == "dpmsolver++":
        return data_weights(sigma, sigma_next, heun=heun)
    return diffusers_sde_curvature(data_weights(sigma, sigma_next, heun=heun, eta=1.0))
