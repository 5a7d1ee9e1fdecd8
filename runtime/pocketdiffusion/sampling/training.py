"""The noise levels a network was trained on, and the link between a level and the network's timestep.

Limits: discrete variance-preserving tables (DDPM, arXiv:2006.11239) and rectified flow (arXiv:2209.03003).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketdiffusion.errors import BundleUnsupported
from pocketdiffusion.sampling.types import Sigmas

INFINITE_SIGMA = 1e8
"""Stands for an infinite sigma: the clean latent's share of the state is then below float32's precision."""
NEAR_INFINITE_ALPHA = 2.0**-24
"""The last alpha_cumprod that Diffusers' Euler, DPM-Solver and UniPC put in place of zero: sigma is 4096."""


@dataclass(frozen=True, slots=True)
class TrainingLevels:
    """Sigmas of the training timesteps 0 ... steps - 1, increasing; empty for a rectified flow.

    `continuous` networks take ``log(sigma) / 4`` as their timestep (EDM's c_noise, arXiv:2206.00364, table 1).
    """

    sigmas: Sigmas
    steps: int
    flow: bool = False
    continuous: bool = False

    def timestep(self, sigma: float) -> float:
        """The timestep of any sigma: exact for a flow, else interpolated in log sigma and clamped to the table."""
        if self.flow:
            return self.steps * sigma / (1 + sigma)
        log_sigma = math.log(max(sigma, 1e-10))
        if self.continuous:
            return log_sigma / 4
        return float(np.interp(log_sigma, np.log(self.sigmas.astype(np.float32)), np.arange(self.steps)))

    def sigma(self, timestep: float) -> float:
        """The sigma of a timestep in [0, steps); between two table entries it is interpolated linearly in sigma."""
        if self.flow:
            return flow_sigma(timestep / self.steps)
        return float(np.interp(timestep, np.arange(self.steps), self.sigmas))


def flow_sigma(time: float) -> float:
    """The sigma of a flow time t in [0, 1], where the state is ``(1 - t) * clean + t * noise``."""
    return min(time / (1 - time), INFINITE_SIGMA) if time < 1 else INFINITE_SIGMA


def training_levels(config: Mapping[str, Any], *, zero_snr_alpha: float = NEAR_INFINITE_ALPHA) -> TrainingLevels:
    """Read the noise table out of a `scheduler_config.json`.

    `zero_snr_alpha` replaces a terminal alpha_cumprod of zero (`rescale_betas_zero_snr`); 0 asks for INFINITE_SIGMA.
    Tables are made in float32 as in training, so that they are the ones the network saw.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    betas = _betas(config, steps)
    alphas_cumprod = _cumulative(1 - betas)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        alphas_cumprod[-1] = zero_snr_alpha or 1 / (1 + INFINITE_SIGMA**2)
    sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod).astype(np.float64)
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return TrainingLevels(sigmas, len(sigmas), continuous=continuous)


def _betas(config: Mapping[str, Any], steps: int) -> NDArray[np.float32]:
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float32)
    name = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if name == "linear":
        return np.linspace(start, end, steps, dtype=np.float32)
    if name == "scaled_linear":
        return np.square(np.linspace(start**0.5, end**0.5, steps, dtype=np.float32))
    if name == "squaredcos_cap_v2":
        return _cosine_betas(steps)
    allowed = "linear, scaled_linear, squaredcos_cap_v2, or trained_betas"
    raise BundleUnsupported(f"beta_schedule '{name}' of the scheduler config is not supported; supported: {allowed}")


def _cosine_betas(steps: int) -> NDArray[np.float32]:
    """Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17, with beta at most 0.999."""
    time = np.arange(steps + 1) / steps
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999), dtype=np.float32)


def _cumulative(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _zero_terminal_snr(alphas_cumprod: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lin et al. 2023, arXiv:2305.08891, algorithm 1: shift and scale sqrt(alpha_cumprod) so that its last is 0."""
    root = np.sqrt(alphas_cumprod)
    scaled = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.asarray(scaled**2, dtype=np.float32)
