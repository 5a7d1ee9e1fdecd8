"""Guidance as an input of the denoiser, for models distilled to take its scale (LCM; arXiv:2310.04378, section 4.2).

Such a denoiser has the input `timestep_cond`; it runs once a step, and there is no negative prompt.
"""

from __future__ import annotations

import math

import numpy as np

from pocketdiffusion.component import Component
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.request import Request
from pocketdiffusion.tensors import Array

INPUT = "timestep_cond"


def takes_scale(denoiser: Component) -> bool:
    """Whether the denoiser is told the guidance scale."""
    return INPUT in denoiser.entry.inputs


def scale_input(request: Request, denoiser: Component) -> dict[str, Array]:
    """The input that holds the guidance scale, one row for each image; nothing for other denoisers.

    Raises InvalidRequest for settings that need two passes.
    """
    if not takes_scale(denoiser):
        return {}
    unusable = {
        "negative_prompt": request.negative_prompt is not None,
        "guidance_rescale": request.guidance_rescale != 0,
        "guidance_hold": request.guidance_hold is not None,
        "guidance_interval": request.guidance_interval != (0.0, 1.0),
    }
    for name, given in unusable.items():
        if given:
            raise InvalidRequest(name, f"{name} was given; this model has its guidance built in and takes none")
    width = denoiser.entry.inputs[INPUT].shape[1]
    if not isinstance(width, int):
        raise ValueError(f"the axis of {INPUT} must be fixed")
    return {INPUT: np.tile(embedding(request.guidance_scale or 0.0, width), (request.batch, 1))}


def embedding(scale: float, width: int) -> Array:
    """Sines and cosines of 1000 (scale - 1) at `width` // 2 frequencies from 1 to 1/10000: (1, width) float32."""
    half = width // 2
    step = np.float32(math.log(10000.0)) / np.float32(half - 1)
    # float32 throughout, as in Diffusers: the angles are so large that rounding shows in their sines.
    angles = np.float32(scale - 1) * np.float32(1000) * np.exp(np.arange(half, dtype=np.float32) * -step)
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)])
    return np.asarray(waves[np.newaxis], np.float32)
