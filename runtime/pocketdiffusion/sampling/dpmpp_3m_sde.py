"""DPM-Solver++(3M) SDE: A1111's "DPM++ 3M SDE", k-diffusion's three-answer exponential integrator for the SDE.

The integral of Lu et al. 2022, arXiv:2211.01095 (SDE appendix) with the quadratic through the last three answers.
Diffusers has no such class. Limit: the second derivative is halved as in k-diffusion, so that a seed gives the picture
that is known from there; the rate for `eta` 0 is therefore second order.
"""

from __future__ import annotations

from collections.abc import Iterator

from pocketdiffusion.sampling._multistep import Weights, data_weights, halve_curvature, multistep, multistep_orders
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def dpmpp_3m_sde(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Stochastic; one network call and one draw a step (no draw for a step to sigma 0, or with `eta` 0).

    `eta` scales the randomness, 0 being the ODE; `s_noise` scales the draws.
    """

    def rule(sigma: float, sigma_next: float, order: int) -> Weights:
        return halve_curvature(data_weights(sigma, sigma_next, heun=True, eta=eta, s_noise=s_noise))

    levels: list[float] = sigmas.tolist()
    orders = multistep_orders(levels, 3, lower_order_final=False, euler_at_final=False)
    yield from multistep(denoise, x, levels, noise, orders=orders, rule=rule)
