"""What the exponential-integrator solvers share: phi functions, slopes over the history, weights of one update.

In the coordinates of `sampling.types` the probability-flow ODE is linear but for the network's answer. With
``lambda = -log(sigma)`` (half the log-SNR) and ``h`` the step in it, a step integrates a polynomial through the answers
exactly: of the noise estimate in DPM-Solver (Lu et al. 2022, arXiv:2206.00927), of the clean estimate in DPM-Solver++
(Lu et al. 2022, arXiv:2211.01095).
The linear part is written as an interpolation between `x` and the clean estimate, so a very large `sigma` (standing
for infinity) loses nothing, and `sigma_next = 0` needs no special case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.sampling.types import Denoise, Noise, Step
from pocketdiffusion.tensors import Array

T = TypeVar("T")

SHORT_RUN = 15
"""From this number of steps on `lower_order_final` has no effect, as in the authors' code."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the network: at the level `sigma`, of the quantity that the solver integrates."""

    sigma: float
    value: Array


@dataclass(frozen=True, slots=True)
class Weights:
    """``x_next = x X + denoised D + slope h f' + curvature h² f'' + noise n``, n standard normal, h the step in lambda.

    f is the integrated quantity (the clean estimate or the noise estimate), its derivatives are taken in lambda.
    """

    x: float
    denoised: float
    slope: float
    curvature: float
    noise: float = 0.0


Rule = Callable[[float, float, int], Weights]
"""(sigma, sigma_next, order) -> the weights of one update."""


def choose(sampler: str, option: str, value: T, allowed: Sequence[T]) -> T:
    """`value`, if it is allowed; otherwise `InvalidRequest` that lists what is."""
    if value not in allowed:
        listed = ", ".join(str(item) for item in allowed)
        raise InvalidRequest(option, f"{sampler} was asked for {option}={value!r}; allowed: {listed}")
    return value


def phi(k: int, z: float) -> float:
    """The k-th phi function (k >= 1): phi_1(z) = (e^z - 1) / z, phi_{k+1}(z) = (phi_k(z) - 1/k!) / z."""
    if z == 0.0:
        return 1.0 / math.factorial(k)
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def log_step(sigma: float, sigma_next: float) -> float:
    """The step in lambda from `sigma` to `sigma_next`; infinite if that is 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0.0 else math.inf


def slopes(answers: Sequence[Answer]) -> list[Array]:
    """First and second derivative in lambda, at the first answer, of the polynomial through up to three answers."""
    if len(answers) < 2:
        return []
    a, b = answers[0], answers[1]
    ab: Array = (b.value - a.value) / log_step(a.sigma, b.sigma)
    if len(answers) == 2:
        return [ab]
    c = answers[2]
    bc = (c.value - b.value) / log_step(b.sigma, c.sigma)
    abc = (bc - ab) / log_step(a.sigma, c.sigma)
    slope: Array = ab - log_step(a.sigma, b.sigma) * abc
    curvature: Array = 2.0 * abc
    return [slope, curvature]


def data_weights(sigma: float, sigma_next: float, *, heun: bool, eta: float = 0.0, s_noise: float = 1.0) -> Weights:
    """Integrates the clean estimate (DPM-Solver++). `eta` 0 is the ODE, 1 the reverse-time SDE.

    `heun` integrates the slope exactly; otherwise the midpoint rule takes half the weight of the clean estimate.
    """
    h = log_step(sigma, sigma_next)
    reach = h * (1.0 + eta)
    gain = -math.expm1(-reach)
    return Weights(
        x=math.exp(-reach),
        denoised=gain,
        slope=1.0 - phi(1, -reach) if heun else 0.5 * gain,
        curvature=0.5 - phi(2, -reach),
        noise=s_noise * sigma_next * math.sqrt(-math.expm1(-2.0 * eta * h)) if eta > 0.0 else 0.0,
    )


def noise_weights(sigma: float, sigma_next: float, *, heun: bool) -> Weights:
    """Integrates the noise estimate (DPM-Solver, DEIS)."""
    h = log_step(sigma, sigma_next)
    ratio = sigma_next / sigma
    return Weights(
        x=ratio,
        denoised=1.0 - ratio,
        slope=-sigma_next * (phi(1, h) - 1.0) if heun else 0.5 * (sigma_next - sigma),
        curvature=-sigma_next * (phi(2, h) - 0.5),
    )


def halve_curvature(weights: Weights) -> Weights:
    """The authors' multistep formulas use the second divided difference, which is half the second derivative."""
    return replace(weights, curvature=0.5 * weights.curvature)


def diffusers_sde_curvature(weights: Weights) -> Weights:
    """Diffusers 0.39 subtracts one half in its third-order SDE updates where the integral adds it."""
    return replace(weights, curvature=weights.curvature - 1.0)


def update(weights: Weights, x: Array, denoised: Array, derivatives: Sequence[Array], h: float, noise: Noise) -> Array:
    """One step; draws once if the weights hold noise."""
    result = weights.x * x + weights.denoised * denoised
    powers = (weights.slope * h, weights.curvature * h * h)
    for weight, derivative in zip(powers, derivatives, strict=False):
        result = result + weight * derivative
    return result + weights.noise * noise() if weights.noise else result


def multistep_orders(levels: Sequence[float], order: int, lower_order_final: bool, euler_at_final: bool) -> list[int]:
    """The order of each step: growing at the start, falling at the end of a short run, 1 for a step to sigma 0."""
    steps = len(levels) - 1
    orders = [min(order, index + 1) for index in range(steps)]
    short = lower_order_final and steps < SHORT_RUN
    if short and steps >= 2:
        orders[-2] = min(orders[-2], 2)
    if short or euler_at_final or levels[-1] == 0.0:
        orders[-1] = 1
    return orders


def multistep(
    denoise: Denoise,
    x: Array,
    levels: Sequence[float],
    noise: Noise,
    *,
    orders: Sequence[int],
    rule: Rule,
    of_noise: bool = False,
) -> Iterator[Step]:
    """One network call a step; earlier answers raise the order. `of_noise`: integrate the noise estimate."""
    answers: list[Answer] = []
    for index, order in enumerate(orders):
        sigma, sigma_next = levels[index], levels[index + 1]
        denoised = denoise(x, sigma)
        answers = [Answer(sigma, (x - denoised) / sigma if of_noise else denoised), *answers[:2]]
        weights, h = rule(sigma, sigma_next, order), log_step(sigma, sigma_next)
        x_next = update(weights, x, denoised, slopes(answers[:order]), h, noise)
        step = Step(index, len(orders), sigma, sigma_next, x_next, denoised)
        yield step
        x = step.x
