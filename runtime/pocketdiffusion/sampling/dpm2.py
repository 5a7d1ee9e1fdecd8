"""DPM-Solver-2 in sigma, plain and ancestral (k-diffusion's names)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pocketdiffusion.sampling._math import NO_SECOND_ORDER, ancestral, derivative, intervals, toward
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array

OFF_GRID = 1 - 1e-12
"""Keeps midpoints apart from the run's levels, whose timesteps may be rounded: with eta 1 the two coincide."""


def dpm2(denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Midpoint method in sigma, the midpoint taken in log sigma (Lu et al. 2022, arXiv:2206.00927, algorithm 1)."""
    return dpm2_ancestral(denoise, x, sigmas, noise, eta=0.0)


def dpm2_ancestral(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """`dpm2` to a level below the next, then noise up to it; `eta` and `s_noise` as in `euler_ancestral`."""
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        if down == 0 or sigma >= NO_SECOND_ORDER:
            x = toward(denoised, x, down / sigma)
        else:
            middle = math.sqrt(sigma * down) * OFF_GRID
            halfway = toward(denoised, x, middle / sigma)
            denoised = denoise(halfway, middle)
            x = x + (down - sigma) * derivative(denoised, halfway, middle)
        if up > 0:
            x = x + (s_noise * up) * noise()
        step = Step(index, len(sigmas) - 1, sigma, sigma_next, x, denoised)
        yield step
        x = step.x
