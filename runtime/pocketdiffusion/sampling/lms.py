"""Linear multistep (Adams-Bashforth) on unevenly spaced levels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from pocketdiffusion.sampling._math import derivative, intervals, toward
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array


def lms(denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, *, order: int = 4) -> Iterator[Step]:
    """Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, section III.5: variable-step Adams.

    One evaluation a step; the first `order` - 1 steps use what history there is.
    """
    slopes: deque[tuple[float, Array]] = deque(maxlen=order)
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, sigma)
        slopes.appendleft((sigma, derivative(denoised, x, sigma)))
        weights = _weights([level for level, _ in slopes], sigma, sigma_next)
        if len(slopes) == 1:
            x = toward(denoised, x, sigma_next / sigma)
        else:
            for weight, (_, slope) in zip(weights, slopes, strict=True):
                x = x + weight * slope
        step = Step(index, len(sigmas) - 1, sigma, sigma_next, x, denoised)
        yield step
        x = step.x


def _weights(nodes: Sequence[float], start: float, stop: float) -> list[float]:
    """Integrals from start to stop of the Lagrange basis polynomials on `nodes`.

    Gauss-Legendre quadrature with len(nodes) points is exact for their degree.
    """
    points, factors = np.polynomial.legendre.leggauss(len(nodes))
    at = (stop + start) / 2 + (stop - start) / 2 * points
    return [float(factors @ _basis(nodes, k, at)) * (stop - start) / 2 for k in range(len(nodes))]


def _basis(nodes: Sequence[float], k: int, at: Sigmas) -> Sigmas:
    value = np.ones_like(at)
    for j, node in enumerate(nodes):
        if j != k:
            value = value * (at - node) / (nodes[k] - node)
    return value
