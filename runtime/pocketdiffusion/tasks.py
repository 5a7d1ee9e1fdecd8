"""What a task is made of: a starting state, a slice of the noise levels, at most one wrapper round `denoise`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.request import Request
from pocketdiffusion.sampling.denoise import Parameterization
from pocketdiffusion.sampling.schedules import Levels
from pocketdiffusion.sampling.types import Denoise, Noise
from pocketdiffusion.tensors import Array

Encode = Callable[[Array, Noise], Array]
"""(pictures (n, height, width, 3) in [-1, 1], noise) -> denoiser latents."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where the loop begins."""

    x: Array
    levels: Levels
    wrap: Callable[[Denoise], Denoise] = lambda denoise: denoise


def text_to_image(
    request: Request, levels: Levels, parameterization: Parameterization, noise: Noise, encode: Encode
) -> Start:
    """Pure noise at the highest level."""
    unit = noise() if request.latents is None else request.latents
    return Start((unit * levels.initial_scale).astype(np.float32), levels)


def image_to_image(
    request: Request, levels: Levels, parameterization: Parameterization, noise: Noise, encode: Encode
) -> Start:
    """A noised picture at the level that `strength` of the steps reach (SDEdit, arXiv:2108.01073)."""
    if request.image is None:
        raise InvalidRequest("image", "image-to-image needs image")
    total = len(levels.timesteps)
    run = min(int(total * request.strength), total)
    if run == 0:
        raise InvalidRequest(
            "strength",
            f"strength {request.strength} of {total} steps leaves no step; raise strength or num_inference_steps",
        )
    rest = levels.tail(total - run)
    images = np.repeat(request.image, request.batch, axis=0)
    latents = encode(images, noise)
    return Start(parameterization.noised(latents, noise(), float(rest.sigmas[0])), rest)


TASKS = {
    "text-to-image": text_to_image,
    "image-to-image": image_to_image,
}
