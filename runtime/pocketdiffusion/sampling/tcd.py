"""Sampling of trajectory consistency models: go below the next level, then noise up to it.

Zheng et al. 2024, arXiv:2402.19159, "strategic stochastic sampling" (its gamma-sampling algorithm), with the DDIM form
of the consistency function as in Diffusers' ``TCDScheduler``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.sampling._math import intervals, toward
from pocketdiffusion.sampling.training import TrainingLevels
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def tcd(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, training: TrainingLevels, eta: float = 0.3
) -> Iterator[Step]:
    """Stochastic; one network call a step; one draw a step but for the last, none with `eta` 0.

    `eta` in [0, 1] is the paper's gamma: the level below is that of the timestep ``floor((1 - eta) * next timestep)``
    of `training`; 0 is deterministic. Raises `InvalidRequest` outside.
    """
    if not 0.0 <= eta <= 1.0:
        raise InvalidRequest("eta", f"tcd was asked for eta={eta}; allowed: 0 to 1")
    total = len(sigmas) - 1
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        fresh = eta > 0.0 and index < total - 1
        below = _below(training, sigma_next, eta) if fresh else sigma_next
        x_next = toward(denoised, x, below / sigma)
        if fresh:
            x_next = x_next + math.sqrt(sigma_next**2 - below**2) * noise()
        step = Step(index, total, sigma, sigma_next, x_next, denoised)
        yield step
        x = step.x


def _below(training: TrainingLevels, sigma_next: float, eta: float) -> float:
    # In float32 as in Diffusers, because the rounding of the product (e.g. 0.7 * 10) decides what floor gives.
    timestep = np.float32(1.0 - eta) * np.float32(round(training.timestep(sigma_next)))
    return min(training.sigma(math.floor(timestep)), sigma_next)
