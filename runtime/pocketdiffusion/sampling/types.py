"""What a sampler sees: a denoiser, a state, noise levels, a source of noise.

Coordinates. All samplers work on ``x = clean + sigma * noise`` (Karras et al. 2022, arXiv:2206.00364: "variance
exploding"), whatever the network was trained for. A variance-preserving state ``a·clean + b·noise`` (eps, v) and a
rectified-flow state ``(1-t)·clean + t·noise`` are both this state times a scale, so the conversion lives in one place,
`pocketdiffusion.sampling.denoise`, and stochastic samplers need no flow variant. An infinite sigma (zero terminal
SNR, flow at t = 1) is stood for by a large finite one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketdiffusion.tensors import Array, Noise

__all__ = ["Array", "Denoise", "Noise", "Sampler", "Sigmas", "Step"]

Sigmas = NDArray[np.float64]
"""Noise levels, shape (steps + 1,), decreasing (the last may repeat the one before); the last may be 0."""

Denoise = Callable[[Array, float], Array]
"""(x, sigma) -> estimate of the clean latent, same shape as x, float32."""


@dataclass(slots=True)
class Step:
    """One finished sampler step. A consumer may assign `x`: the sampler goes on from what it finds there."""

    index: int
    """Counted from 0."""
    total: int
    sigma: float
    """The level that the step started from."""
    sigma_next: float
    """The level of `x`."""
    x: Array
    denoised: Array
    """The latest estimate of the clean latent, for previews."""


class Sampler(Protocol):
    """A stepper: yields a `Step` after each of the ``len(sigmas) - 1`` steps."""

    def __call__(self, denoise: Denoise, x: Array, sigmas: Sigmas, noise: Noise, **options: Any) -> Iterator[Step]:
        """Sample from state `x`, shape (images, channels, height, width), at ``sigmas[0]``."""
        ...
