"""PNDM and PLMS: linear multistep methods on the network's output, each step a DDIM transfer.

Liu et al. 2022, arXiv:2202.09778, equations 9, 12 and 13 and algorithm 2. `pndm` starts with the pseudo Runge-Kutta
method (four calls a step), `plms` with one pseudo improved Euler step (two calls).

A `Step` is one move to the next level, however many calls it takes: Diffusers' ``PNDMScheduler``, which returns after
each call, passes through the same states at the end of each of its groups of calls.

Limits. Where the distance of two timesteps is odd, Diffusers moves to a level one timestep beside the one it then
evaluates as the middle of a Runge-Kutta step; here the two are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pocketdiffusion.sampling._math import NO_SECOND_ORDER, derivative, intervals, toward
from pocketdiffusion.sampling._multistep import choose
from pocketdiffusion.sampling.training import TrainingLevels
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the newest and the older outputs, by how many there are (equation 12 and algorithm 2)."""

_Start = Callable[[Array, Array, float, float], tuple[Array, Array]]
"""(state, output there, sigma, sigma_next) -> (averaged output, latest clean estimate)."""


def plms(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, prediction_type: str = "epsilon"
) -> Iterator[Step]:
    """Deterministic; two network calls in the first of several steps, then one a step; never draws.

    `prediction_type` says which output is averaged, as Diffusers averages what the network gives: "epsilon" or
    "v_prediction". Raises `InvalidRequest` for another.
    """
    network = _network("plms", denoise, prediction_type)

    def start(x: Array, first: Array, sigma: float, sigma_next: float) -> tuple[Array, Array]:
        end, denoised = network.evaluate(network.transfer(x, sigma, sigma_next, first), sigma_next)
        return _mean((first, end), (1 / 2, 1 / 2)), denoised

    yield from _linear_multistep(network, x, sigmas, start, start_steps=1)


def pndm(
    denoise: Denoise,
    x: Array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    training: TrainingLevels,
    prediction_type: str = "epsilon",
) -> Iterator[Step]:
    """Deterministic; four network calls in each of the first three steps, then one a step; never draws.

    The last step is never a Runge-Kutta one, so that 1 to 3 steps work too (Diffusers' class fails for them).
    `training` gives the level half-way between two timesteps; `prediction_type` as in `plms`.
    """
    network = _network("pndm", denoise, prediction_type)

    def start(x: Array, first: Array, sigma: float, sigma_next: float) -> tuple[Array, Array]:
        middle = _middle(training, sigma, sigma_next)
        second, _ = network.evaluate(network.transfer(x, sigma, middle, first), middle)
        third, _ = network.evaluate(network.transfer(x, sigma, middle, second), middle)
        fourth, denoised = network.evaluate(network.transfer(x, sigma, sigma_next, third), sigma_next)
        return _mean((first, second, third, fourth), (1 / 6, 1 / 3, 1 / 3, 1 / 6)), denoised

    yield from _linear_multistep(network, x, sigmas, start, start_steps=3)


@dataclass(frozen=True, slots=True)
class _Network:
    """The output that is averaged, noise estimate or v, and the move to another level along it."""

    denoise: Denoise
    is_v: bool

    def evaluate(self, x: Array, sigma: float) -> tuple[Array, Array]:
        """(output, clean estimate)."""
        denoised = self.denoise(x, sigma)
        if not self.is_v:
            return derivative(denoised, x, sigma), denoised
        alpha = 1.0 / math.sqrt(1.0 + sigma**2)
        return (alpha**2 * x - denoised) / (alpha * sigma), denoised

    def transfer(self, x: Array, sigma: float, sigma_next: float, output: Array) -> Array:
        """The DDIM step (equation 9) from `x` at `sigma` along an output."""
        if not self.is_v:
            return x + (sigma_next - sigma) * output
        alpha = 1.0 / math.sqrt(1.0 + sigma**2)
        ratio = sigma_next / sigma
        return (ratio + (1.0 - ratio) * alpha**2) * x + ((sigma_next - sigma) * alpha) * output


def _network(sampler: str, denoise: Denoise, prediction_type: str) -> _Network:
    kind = choose(sampler, "prediction_type", prediction_type, ("epsilon", "v_prediction"))
    return _Network(denoise, is_v=kind == "v_prediction")


def _linear_multistep(network: _Network, x: Array, sigmas: Sigmas, start: _Start, start_steps: int) -> Iterator[Step]:
    """Adams-Bashforth on the outputs after `start_steps` steps with `start`; the last step is never one of these."""
    outputs: list[Array] = []
    total = len(sigmas) - 1
    for index, sigma, sigma_next in intervals(sigmas):
        output, denoised = network.evaluate(x, sigma)
        outputs = [output, *outputs[:3]]
        if sigma > NO_SECOND_ORDER:
            x_next = toward(denoised, x, sigma_next / sigma)
        else:
            mean = _mean(outputs, ADAMS_BASHFORTH[len(outputs) - 1])
            if index < min(start_steps, total - 1):
                mean, denoised = start(x, output, sigma, sigma_next)
            x_next = network.transfer(x, sigma, sigma_next, mean)
        step = Step(index, total, sigma, sigma_next, x_next, denoised)
        yield step
        x = step.x


def _mean(outputs: Sequence[Array], weights: Sequence[float]) -> Array:
    terms = [weight * output for weight, output in zip(weights, outputs, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _middle(training: TrainingLevels, sigma: float, sigma_next: float) -> float:
    """The level of the whole timestep half-way between two levels."""
    start, end = round(training.timestep(sigma)), round(training.timestep(sigma_next))
    return training.sigma(end + (start - end) // 2)
