"""DPM-Solver++ SDE with one midpoint: k-diffusion's and A1111's "DPM++ SDE", Diffusers' ``DPMSolverSDEScheduler``.

Lu et al. 2022, arXiv:2211.01095, algorithm 1 with r = 1/2, made ancestral as in Karras et al. 2022, arXiv:2206.00364.

The noise of the whole step belongs to the same Brownian path (in sigma) as that of its first part: it is the weighted
sum of the draws over the two parts. The path itself comes from `noise`, so it isn't the one that torchsde's tree
would give for a seed; the distribution is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pocketdiffusion.sampling._math import ancestral, intervals, toward
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def dpmpp_sde(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Two network calls and two draws a step; one call and no draw for a step to sigma 0.

    `eta` scales the share of fresh noise, 0 being the ODE (nothing is drawn); `s_noise` scales the draws.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = x_next = denoise(x, sigma)
        if sigma_next > 0.0:
            middle = math.sqrt(sigma * sigma_next)
            down, up = ancestral(sigma, middle, eta)
            x_next = toward(denoised, x, down / sigma)
            if up > 0.0:
                first = noise()
                x_next = x_next + (s_noise * up) * first
            denoised = denoise(x_next, middle)
            down, up = ancestral(sigma, sigma_next, eta)
            x_next = toward(denoised, x, down / sigma)
            if up > 0.0:
                x_next = x_next + (s_noise * up) * brownian_sum(first, noise(), sigma, middle, sigma_next)
        step = Step(index, len(sigmas) - 1, sigma, sigma_next, x_next, denoised)
        yield step
        x = step.x


def brownian_sum(first: Array, second: Array, sigma: float, middle: float, sigma_next: float) -> Array:
    """The standard-normal increment over a step from those over (sigma, middle) and (middle, sigma_next)."""
    share = (sigma - middle) / (sigma - sigma_next)
    return math.sqrt(share) * first + math.sqrt(1.0 - share) * second
