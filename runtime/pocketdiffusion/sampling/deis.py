"""DEIS: the noise estimate as a polynomial in log(sigma), integrated exactly ("log-rho Adams-Bashforth").

Zhang and Chen 2022, arXiv:2204.13902, section 3 (tAB-DEIS with rho = sigma in these coordinates). The integrals of
the Lagrange polynomials are the phi functions of `sampling._multistep`, so there is no quadrature.
Options as in Diffusers' ``DEISMultistepScheduler``, whose only algorithm ("deis") and solver ("logrho") this is.
"""

from __future__ import annotations

from collections.abc import Iterator

from pocketdiffusion.sampling._multistep import Weights, choose, multistep, multistep_orders, noise_weights
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def deis(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, solver_order: int = 2, lower_order_final: bool = True
) -> Iterator[Step]:
    """Deterministic; one network call a step; never draws.

    `solver_order` 1 to 3. `lower_order_final`: with fewer than 15 steps the last two are of order 2 and 1.
    Raises `InvalidRequest` for another order.
    """

    def rule(sigma: float, sigma_next: float, order: int) -> Weights:
        return noise_weights(sigma, sigma_next, heun=True)

    levels: list[float] = sigmas.tolist()
    order = choose("deis", "solver_order", solver_order, (1, 2, 3))
    orders = multistep_orders(levels, order, lower_order_final, euler_at_final=False)
    yield from multistep(denoise, x, levels, noise, orders=orders, rule=rule, of_noise=True)
