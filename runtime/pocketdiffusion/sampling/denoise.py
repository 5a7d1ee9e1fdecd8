"""What stands between a network and a sampler: parameterization, guidance, clipping. Each is a wrapper tested alone.

Limits: networks that also predict a variance are not supported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pocketdiffusion.sampling.training import TrainingLevels
from pocketdiffusion.sampling.types import Denoise
from pocketdiffusion.tensors import Array

Network = Callable[[Array, float], Array]
"""(input in the network's own coordinates, timestep) -> raw output, same shape, float32."""

Passes = Callable[[Array, float], tuple[Array, ...]]
"""(input, timestep) -> raw outputs from the unconditional to the fully conditional one, each with one condition more;
batched or in turn is the caller's business."""

Active = Callable[[float], bool]
"""timestep -> whether guidance applies."""

Kind = Literal["eps", "v", "sample", "flow"]


@dataclass(frozen=True, slots=True)
class Parameterization:
    """What the network's input and output mean; scalars are sigmas, arrays of any shape, float32.

    eps and sample: arXiv:2006.11239; v: arXiv:2202.00512, appendix D; flow (noise minus clean): arXiv:2209.03003.
    """

    kind: Kind
    training: TrainingLevels
    timesteps: Mapping[float, float] = field(default_factory=dict)
    """Exact timesteps of a run's own sigmas; other sigmas are looked up in the training table."""

    def timestep(self, sigma: float) -> float:
        """The network's timestep at `sigma`."""
        exact = self.timesteps.get(sigma)
        return self.training.timestep(sigma) if exact is None else exact

    def model_input(self, x: Array, sigma: float) -> Array:
        """The state in the network's own coordinates (unit variance for eps, v and sample; on the line for flow)."""
        return x * self._scale(sigma)

    latent = model_input
    """The same conversion at the end of sampling and for callbacks; at sigma 0 it is the identity."""

    def state(self, latent: Array, sigma: float) -> Array:
        """The inverse of `latent`."""
        return latent / self._scale(sigma)

    def noised(self, clean: Array, noise: Array, sigma: float) -> Array:
        """The state that `clean` has at `sigma`, with `noise` standard normal."""
        return clean + sigma * noise

    def denoised(self, x: Array, sigma: float, output: Array) -> Array:
        """The estimate of the clean latent that a raw output at state `x` stands for."""
        if self.kind == "sample":
            return output
        if self.kind == "eps":
            return x - sigma * output
        scale = self._scale(sigma)
        if self.kind == "v":
            return x * scale**2 - (sigma * scale) * output
        return x * scale - (sigma * scale) * output

    def noise_share(self, timestep: float) -> float:
        """How much more noise in the state, in standard deviations, one more of raw output says that there is."""
        sigma = self.training.sigma(timestep)
        return {"eps": 1.0, "sample": 1 / sigma}.get(self.kind, self._scale(sigma))

    def _scale(self, sigma: float) -> float:
        return 1 / (1 + sigma) if self.kind == "flow" else 1 / math.sqrt(1 + sigma**2)


def denoiser(network: Network, parameterization: Parameterization) -> Denoise:
    """A network as samplers see it."""

    def denoise(x: Array, sigma: float) -> Array:
        output = network(parameterization.model_input(x, sigma), parameterization.timestep(sigma))
        return parameterization.denoised(x, sigma, output)

    return denoise


def always(timestep: float) -> bool:
    """Guidance at every timestep."""
    return True


def interval(start: float, stop: float, train_steps: int) -> Active:
    """Guidance while ``start <= 1 - timestep / train_steps <= stop``: fractions of progress, from noise to image.

    Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """

    last, first = train_steps * (1 - stop), train_steps * (1 - start)

    def active(timestep: float) -> bool:
        return last <= timestep <= first

    return active


def guided(
    passes: Passes, conditional: Network, *scales: float, rescale: float = 0.0, active: Active = always
) -> Network:
    """Classifier-free guidance (arXiv:2207.12598) on raw outputs; only `conditional` runs where not `active`.

    There is a scale for each condition that a pass adds: the prompt's, or a picture's and then the prompt's
    (arXiv:2211.09800, equation 3).

    `rescale` in [0, 1] pulls the guided output's deviation back to the conditional one's (arXiv:2305.08891, 3.4).
    """

    def network(x: Array, timestep: float) -> Array:
        if not active(timestep):
            return conditional(x, timestep)
        outputs = passes(x, timestep)
        output = outputs[0]
        for scale, less, more in zip(scales, outputs[:-1], outputs[1:], strict=True):
            output = output + scale * (more - less)
        return _rescaled(output, outputs[-1], rescale) if rescale > 0 else output

    return network


def holding(
    passes: Passes, conditional: Network, active: Active, noise_share: Callable[[float], float] = lambda timestep: 1.0
) -> Passes:
    """Where not `active`, only `conditional` runs, and the other outputs keep their last distance from it.

    The distance is held in the noise that outputs say there is, see `Parameterization.noise_share`: late in a run it is
    nearly the same at every step. Reuse of it is FasterCache's (arXiv:2410.19355), there for videos. The first call
    always runs all passes. Made for one run.
    """
    distances: list[Array] = []

    def held(x: Array, timestep: float) -> tuple[Array, ...]:
        share = noise_share(timestep)
        if distances and not active(timestep):
            output = conditional(x, timestep)
            return tuple(output + distance / share for distance in distances)
        outputs = passes(x, timestep)
        distances[:] = [(output - outputs[-1]) * share for output in outputs]
        return outputs

    return held


def _rescaled(output: Array, positive: Array, amount: float) -> Array:
    axes = tuple(range(1, output.ndim))
    ratio = positive.std(axis=axes, keepdims=True) / output.std(axis=axes, keepdims=True)
    return np.asarray(output * (amount * ratio + (1 - amount)), dtype=np.float32)


def clipped(denoise: Denoise, limit: float) -> Denoise:
    """Keep the estimate within +-limit, for models of pixels."""

    def wrapper(x: Array, sigma: float) -> Array:
        return np.clip(denoise(x, sigma), -limit, limit)

    return wrapper


def thresholded(denoise: Denoise, quantile: float, limit: float) -> Denoise:
    """Dynamic thresholding (Imagen, arXiv:2205.11487, section 2.3) per image, for models of pixels.

    Each estimate is clipped to +-s and divided by s, where s is its `quantile` of magnitudes within [1, limit].
    """

    def wrapper(x: Array, sigma: float) -> Array:
        estimate = denoise(x, sigma)
        axes = tuple(range(1, estimate.ndim))
        bound = np.clip(np.quantile(np.abs(estimate), quantile, axis=axes, keepdims=True), 1, limit)
        return np.asarray(np.clip(estimate, -bound, bound) / bound, dtype=np.float32)

    return wrapper


def consistent(denoise: Denoise, parameterization: Parameterization, scaling: float, deviation: float = 0.5) -> Denoise:
    """The boundary condition of latent consistency models (arXiv:2310.04378, equation 9): the identity at timestep 0.

    `scaling` multiplies the timestep, `deviation` is that of the data (sigma_data).
    """

    def wrapper(x: Array, sigma: float) -> Array:
        time = scaling * parameterization.timestep(sigma)
        norm = time**2 + deviation**2
        skip, out = deviation**2 / norm, time / math.sqrt(norm)
        return out * denoise(x, sigma) + skip * parameterization.latent(x, sigma)

    return wrapper
