"""Euler's method, plain and ancestral (k-diffusion's names)."""

from __future__ import annotations

from collections.abc import Iterator

from pocketdiffusion.sampling._math import ancestral, intervals, toward
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def euler(denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1 without its second-order correction."""
    return euler_ancestral(denoise, x, sigmas, noise, eta=0.0)


def euler_ancestral(
    denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Euler to a level below the next, then noise up to it.

    `eta` in [0, 1] is the share of fresh noise (0 is `euler`, which draws none), `s_noise` scales its deviation.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        x = toward(denoised, x, down / sigma)
        if up > 0:
            x = x + (s_noise * up) * noise()
        step = Step(index, len(sigmas) - 1, sigma, sigma_next, x, denoised)
        yield step
        x = step.x
