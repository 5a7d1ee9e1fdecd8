"""Heun's second-order method."""

from __future__ import annotations

from collections.abc import Iterator

from pocketdiffusion.sampling._math import NO_SECOND_ORDER, derivative, intervals, toward
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def heun(denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise) -> Iterator[Step]:
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1: two evaluations a step, one for a step to sigma 0."""
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        predicted = toward(denoised, x, sigma_next / sigma)
        if sigma_next > 0 and sigma < NO_SECOND_ORDER:
            slope = derivative(denoised, x, sigma)
            denoised = denoise(predicted, sigma_next)
            mean = 0.5 * (slope + derivative(denoised, predicted, sigma_next))
            predicted = x + (sigma_next - sigma) * mean
        step = Step(index, len(sigmas) - 1, sigma, sigma_next, predicted, denoised)
        yield step
        x = step.x
