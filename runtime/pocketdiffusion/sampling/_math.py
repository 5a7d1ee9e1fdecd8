"""Arithmetic that the samplers share. Scalars are Python floats, so that float32 arrays stay float32."""

from __future__ import annotations

import math
from itertools import pairwise

from pocketdiffusion.sampling.types import Sigmas
from pocketdiffusion.tensors import Array

NO_SECOND_ORDER = 1000.0
"""A level above this stands for infinity, where corrections along sigma have no finite size: the step is Euler's."""


def intervals(sigmas: Sigmas) -> list[tuple[int, float, float]]:
    """(index, level, next level) of each step; `sigmas` has shape (steps + 1,)."""
    levels = sigmas.tolist()
    return [(index, *pair) for index, pair in enumerate(pairwise(levels))]


def toward(denoised: Array, x: Array, ratio: float) -> Array:
    """``denoised + ratio * (x - denoised)``: Euler's step to ``ratio * sigma``, without cancellation for any sigma."""
    return denoised + ratio * (x - denoised)


def derivative(denoised: Array, x: Array, sigma: float) -> Array:
    """dx/dsigma of the probability flow ODE (Karras et al. 2022, arXiv:2206.00364, equation 3)."""
    return (x - denoised) / sigma


def ancestral(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """(down, up): step to `down`, then add noise of deviation `up`; ``down**2 + up**2 == sigma_next**2``.

    For eta = 1 this is the posterior of DDPM (arXiv:2006.11239, equations 6 and 7), for other values DDIM's
    (arXiv:2010.02502, equation 16), both in this package's coordinates. The noise is never more than the level holds.
    """
    up = sigma_next * min(1.0, eta * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up
