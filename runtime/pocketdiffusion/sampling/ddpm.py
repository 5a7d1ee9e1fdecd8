"""Denoising diffusion probabilistic models: ancestral sampling with a fixed variance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pocketdiffusion.sampling._math import ancestral, intervals, toward
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def ddpm(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, variance: Literal["small", "large"] = "small"
) -> Iterator[Step]:
    """Ho et al. 2020, arXiv:2006.11239, algorithm 2, with the variances of section 3.2.

    "small" is the posterior's variance, "large" is beta. No noise is added in a step to sigma 0.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next)
        if variance == "large" and sigma_next > 0:
            # beta = 1 - alpha_cumprod / alpha_cumprod_next, times 1 + sigma_next**2 to leave unit-variance coordinates
            up = math.sqrt((1 + sigma_next**2) * (sigma**2 - sigma_next**2) / (1 + sigma**2))
        x = toward(denoised, x, down / sigma)
        if up > 0:
            x = x + up * noise()
        step = Step(index, len(sigmas) - 1, sigma, sigma_next, x, denoised)
        yield step
        x = step.x
