"""Denoising diffusion implicit models."""

from __future__ import annotations

from collections.abc import Iterator

from pocketdiffusion.sampling.euler import euler_ancestral
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def ddim(denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """Song et al. 2020, arXiv:2010.02502, equations 12 and 16: Euler's method in sigma, with a share `eta` of noise."""
    return euler_ancestral(denoise, x, sigmas, noise, eta=eta)
