"""DPM-Solver++ and DPM-Solver, multistep, as ODE and as SDE; A1111's "DPM++ 2M" and "DPM++ 2M SDE".

Lu et al. 2022, arXiv:2211.01095, algorithm 2 (multistep) and its appendix on the SDE; Lu et al. 2022, arXiv:2206.00927.
The options carry the names and meanings of Diffusers' ``DPMSolverMultistepScheduler``; what Diffusers calls
``final_sigmas_type`` is read off the last level: a step to sigma 0 is always of order 1.

Limits. The third order halves the second derivative, as the authors' code does, so it is third in name and second
in rate. Orders above 1 of the noise estimate ("dpmsolver", "sde-dpmsolver") have no finite result from an infinite
sigma. ``lower_order_final`` counts the steps that are run, also when a task enters the schedule late.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.sampling._multistep import (
    Weights,
    choose,
    data_weights,
    diffusers_sde_curvature,
    halve_curvature,
    log_step,
    multistep,
    multistep_orders,
    noise_weights,
    phi,
)
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def dpmpp_2m(
    denoise: Denoise,
    x: Array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    solver_order: int = 2,
    solver_type: str = "midpoint",
    algorithm_type: str = "dpmsolver++",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Iterator[Step]:
    """Deterministic; one network call a step; never draws.

    `solver_order` 1 to 3. `solver_type` "midpoint" or "heun" (how order 2 weighs the slope). `algorithm_type`
    "dpmsolver++" integrates the clean estimate, "dpmsolver" the noise estimate. `lower_order_final`: with fewer than 15
    steps the last two are of order 2 and 1. `euler_at_final`: the last step is of order 1 whatever their number.
    Raises `InvalidRequest` for other values.
    """
    of_noise = choose("dpmpp_2m", "algorithm_type", algorithm_type, ("dpmsolver++", "dpmsolver")) == "dpmsolver"
    order, heun = _choices("dpmpp_2m", solver_order, solver_type)
    weigh = noise_weights if of_noise else data_weights

    def rule(sigma: float, sigma_next: float, at_order: int) -> Weights:
        return halve_curvature(weigh(sigma, sigma_next, heun=heun or at_order == 3))

    levels: list[float] = sigmas.tolist()
    orders = multistep_orders(levels, order, lower_order_final, euler_at_final)
    yield from multistep(denoise, x, levels, noise, orders=orders, rule=rule, of_noise=of_noise)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    solver_order: int = 2,
    solver_type: str = "midpoint",
    algorithm_type: str = "sde-dpmsolver++",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Stochastic; one network call a step; one draw a step, except for a step to sigma 0.

    Options as in `dpmpp_2m`. `algorithm_type` "sde-dpmsolver++" or "sde-dpmsolver" (orders 1 and 2, eta 1, a last level
    above 0). `eta` scales the randomness, 0 being the ODE; `s_noise` scales the draws. With `solver_order` 3 the
    formula is Diffusers', in which the constant of the curvature term has the wrong sign: `dpmpp_3m_sde` has it right.
    Raises `InvalidRequest` for other values.
    """
    kind = choose("dpmpp_2m_sde", "algorithm_type", algorithm_type, ("sde-dpmsolver++", "sde-dpmsolver"))
    order, heun = _choices("dpmpp_2m_sde", solver_order, solver_type)
    levels: list[float] = sigmas.tolist()
    of_noise = kind == "sde-dpmsolver"
    if of_noise:
        _check_noise_sde(order, eta, levels[-1])

    def rule(sigma: float, sigma_next: float, at_order: int) -> Weights:
        if of_noise:
            return _noise_sde_weights(sigma, sigma_next, heun=heun, s_noise=s_noise)
        exact = data_weights(sigma, sigma_next, heun=heun or at_order == 3, eta=eta, s_noise=s_noise)
        return halve_curvature(diffusers_sde_curvature(exact))

    orders = multistep_orders(levels, order, lower_order_final, euler_at_final)
    yield from multistep(denoise, x, levels, noise, orders=orders, rule=rule, of_noise=of_noise)


def _choices(sampler: str, solver_order: int, solver_type: str) -> tuple[int, bool]:
    order = choose(sampler, "solver_order", solver_order, (1, 2, 3))
    return order, choose(sampler, "solver_type", solver_type, ("midpoint", "heun")) == "heun"


def _check_noise_sde(order: int, eta: float, last: float) -> None:
    asked = "dpmpp_2m_sde with algorithm_type='sde-dpmsolver'"
    advice = "use 'sde-dpmsolver++'"
    if order == 3:
        raise InvalidRequest("solver_order", f"{asked} was asked for solver_order=3; allowed: 1, 2; or {advice}")
    if eta != 1.0:
        raise InvalidRequest("eta", f"{asked} was asked for eta={eta}; allowed: 1.0; or {advice}")
    if last == 0.0:
        raise InvalidRequest("algorithm_type", f"{asked} needs a last sigma above 0 and got 0; {advice}")


def _noise_sde_weights(sigma: float, sigma_next: float, *, heun: bool, s_noise: float) -> Weights:
    """SDE-DPM-Solver: the ODE's noise terms doubled, and the variance between the levels drawn anew."""
    h = log_step(sigma, sigma_next)
    gain = 2.0 * (1.0 - sigma_next / sigma)
    return Weights(
        x=1.0 - gain,
        denoised=gain,
        slope=-2.0 * sigma_next * (phi(1, h) - 1.0) if heun else sigma_next - sigma,
        curvature=0.0,
        noise=s_noise * math.sqrt(sigma**2 - sigma_next**2),
    )
