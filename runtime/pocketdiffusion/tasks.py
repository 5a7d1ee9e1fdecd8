"""What a task is made of: a starting state, a slice of the noise levels, at most one wrapper round `denoise`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pocketdiffusion.bundle.manifest import Manifest, Numbers
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.image import mask_to_latent
from pocketdiffusion.request import Request
from pocketdiffusion.sampling.denoise import Parameterization
from pocketdiffusion.sampling.schedules import Levels
from pocketdiffusion.sampling.types import Denoise, Noise
from pocketdiffusion.tensors import Array

Encode = Callable[[Array, Noise], Array]
"""(pictures (1, height, width, 3) in [-1, 1], noise) -> denoiser latents: one for each image, or one for all."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a task starts from."""

    request: Request
    levels: Levels
    parameterization: Parameterization
    noise: Noise
    encode: Encode
    numbers: Numbers
    extra_channels: int
    """Channels that the denoiser takes besides those of the latents."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where the loop begins."""

    x: Array
    levels: Levels
    wrap: Callable[[Denoise], Denoise] = lambda denoise: denoise
    finish: Callable[[Array], Array] = lambda latents: latents
    """Final latents, in the denoiser's coordinates, to those that are decoded."""
    channels: Array | None = None
    """Further channels of the denoiser's input, (n, channels, h, w)."""


def text_to_image(given: Given) -> Start:
    """Pure noise at the highest level."""
    return Start(_pure(given, _unit(given)), given.levels)


def image_to_image(given: Given) -> Start:
    """A noised picture at the level that `strength` of the steps reach (SDEdit, arXiv:2108.01073)."""
    levels = _rest(given)
    latents = given.encode(_picture(given), given.noise)
    return Start(given.parameterization.noised(latents, given.noise(), float(levels.sigmas[0])), levels)


def inpaint(given: Given) -> Start:
    """Repaint what the mask shows white. Denoisers made for it see mask and masked picture as further channels.

    Others are held to the picture by `kept`. The order of draws is Diffusers', up to here: there, a stochastic
    sampler on a denoiser of the second kind goes on one draw later, for a masked picture that is encoded in vain.
    """
    request, levels, image = given.request, _rest(given), _picture(given)
    if request.mask_image is None:
        raise InvalidRequest("mask_image", "inpaint needs mask_image")
    mask = mask_to_latent(request.mask_image, given.numbers.vae_factor)
    whole, made_for_it = request.strength == 1, given.extra_channels > 0
    original = None if whole and made_for_it else given.encode(image, given.noise)
    unit = _unit(given)
    noised = None if original is None else given.parameterization.noised(original, unit, float(levels.sigmas[0]))
    x = _pure(given, unit) if whole or noised is None else noised
    if original is not None and not made_for_it:
        held = original
        return Start(
            x,
            levels,
            wrap=lambda denoise: kept(denoise, held, unit, mask, float(levels.sigmas[0])),
            finish=lambda latents: _mixed(mask, latents, held),
        )
    masked = given.encode(image * (1 - _pixel_mask(request.mask_image)), given.noise)
    return Start(x, levels, channels=np.concatenate([_rows(request, part) for part in (mask, masked)], axis=1))


def instruct(given: Given) -> Start:
    """Change a picture as the prompt says (InstructPix2Pix, arXiv:2211.09800): pure noise, and the picture as channels.

    Its latents are the mean of the VAE's posterior without the model's scale, as in Diffusers; no noise is drawn for
    them.
    """
    numbers, unit = given.numbers, _unit(given)
    latents = given.encode(_picture(given), lambda: np.zeros_like(unit[:1]))
    unscaled = latents / np.float32(numbers.latent_scale) + np.float32(numbers.latent_shift)
    return Start(_pure(given, unit), given.levels, channels=_rows(given.request, unscaled))


def kept(denoise: Denoise, original: Array, unit: Array, mask: Array, first: float) -> Denoise:
    """Hold what the mask shows 0 to the `original` latents, noised with `unit` to each level below the `first`.

    The first level is the start, which is the sampler's own: after pure noise the denoiser sees the original only from
    the second step on, as in Diffusers.
    """

    def wrapper(x: Array, sigma: float) -> Array:
        if sigma < first:
            x = _mixed(mask, x, original + sigma * unit)
        return _mixed(mask, denoise(x, sigma), original)

    return wrapper


def pasted(images: Array, request: Request) -> Array:
    """Pictures (n, height, width, 3) with the pixels outside of the request's mask taken from its picture."""
    if request.image is None or request.mask_image is None:
        return images
    return np.where(_pixel_mask(request.mask_image) > 0, images, request.image)


TASKS: dict[str, Callable[[Given], Start]] = {
    "text-to-image": text_to_image,
    "image-to-image": image_to_image,
    "inpaint": inpaint,
    "instruct": instruct,
}

NEEDS = {"image-to-image": "image", "inpaint": "image and mask_image", "instruct": "image"}
"""Task -> parameters besides the prompt."""


def possible(manifest: Manifest, extra_channels: int) -> tuple[str, ...]:
    """The tasks of a bundle. Older ones do not say that whoever starts from a picture can repaint a part of it."""
    able = "image-to-image" in manifest.tasks and extra_channels == 0
    return (*manifest.tasks, "inpaint") if able and "inpaint" not in manifest.tasks else manifest.tasks


def _rows(request: Request, part: Array) -> Array:
    """The same for each image of the batch."""
    return np.broadcast_to(part, (request.batch, *part.shape[1:]))


def check_mask(request: Request, numbers: Numbers) -> None:
    """Raise InvalidRequest for a mask without a white latent cell, which would leave the picture as it is."""
    if request.mask_image is not None and not mask_to_latent(request.mask_image, numbers.vae_factor).any():
        raise InvalidRequest(
            "mask_image",
            f"mask_image has nothing white (in cells of {numbers.vae_factor} pixels), so that nothing would be "
            "repainted; make white what is to be repainted, or leave the mask out",
        )


def _mixed(mask: Array, white: Array, black: Array) -> Array:
    return np.where(mask > 0, white, black).astype(np.float32)


def _unit(given: Given) -> Array:
    return given.noise() if given.request.latents is None else given.request.latents


def _pure(given: Given, unit: Array) -> Array:
    return (unit * given.levels.initial_scale).astype(np.float32)


def _picture(given: Given) -> Array:
    if given.request.image is None:
        raise InvalidRequest("image", f"{given.request.task} needs image")
    return given.request.image


def _pixel_mask(mask: Array) -> Array:
    """(1, height, width, 1): 1 where to repaint."""
    return mask_to_latent(mask, 1).transpose(0, 2, 3, 1)


def _rest(given: Given) -> Levels:
    """The levels that `strength` leaves."""
    strength, total = given.request.strength, len(given.levels.timesteps)
    if strength is None:
        raise ValueError("the request must be resolved")
    run = min(int(total * strength), total)
    if run == 0:
        raise InvalidRequest(
            "strength", f"strength {strength} of {total} steps leaves no step; raise strength or num_inference_steps"
        )
    return given.levels.tail(total - run)
