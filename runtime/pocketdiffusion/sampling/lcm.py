"""Sampling of latent consistency models: estimate the clean latent, noise it anew to the next level.

Luo et al. 2023, arXiv:2310.04378, algorithm 3 (multistep sampling). The boundary condition of the consistency function
(c_skip, c_out) is a property of the network and belongs to its wrapper, `denoise.consistent`.
"""

from __future__ import annotations

from collections.abc import Iterator

from pocketdiffusion.sampling._math import intervals
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def lcm(denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Stochastic; one network call and one draw a step (no draw for a step to sigma 0)."""
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        x_next = denoised + sigma_next * noise() if sigma_next > 0.0 else denoised
        step = Step(index, len(sigmas) - 1, sigma, sigma_next, x_next, denoised)
        yield step
        x = step.x
