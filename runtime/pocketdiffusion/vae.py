"""Latents to pictures and back, through the bundle's VAE graphs."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import replace

import numpy as np

from pocketdiffusion.bands import run as run_in_bands
from pocketdiffusion.bundle.manifest import Numbers
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleUnsupported, GraphFailed, InvalidRequest
from pocketdiffusion.presets import DECODERS, PRESETS
from pocketdiffusion.request import Request
from pocketdiffusion.tensors import Array, Noise
from pocketdiffusion.tiles import LEAST, Axes, Size, blended, shape
from pocketdiffusion.timing import Timings

COMPONENTS = ("vae_encoder", *DECODERS.values())
"""Those that can run in tiles."""
TINY = DECODERS["tiny"]
"""A distilled decoder (TAESD's kind): takes the denoiser's latents as they are, whatever scale the full one needs."""


def with_decoder(request: Request, bundle: str, components: Container[str]) -> Request:
    """The request with its decoder, as far as it and its preset say; None leaves it to a memory limit.

    `components` are those of a `bundle` of that name; only the full decoder has bands. Raises BundleUnsupported for a
    tiny decoder that is not there, and InvalidRequest for one with bands.
    """
    if request.decoder is None:
        preset = PRESETS[request.preset].decoder
        able = preset is not None and DECODERS[preset] in components
        return replace(request, decoder="full" if request.vae_bands is not None else preset if able else None)
    if DECODERS[request.decoder] not in components:
        raise BundleUnsupported(
            f"decoder '{request.decoder}' was asked; {bundle} has none: leave it out, or add one with "
            "`pocketdiffusion export BUNDLE DEST --tiny-vae SOURCE`"
        )
    if request.decoder == "tiny" and request.vae_bands is not None:
        raise InvalidRequest(
            "decoder", f"decoder is 'tiny' and vae_bands {request.vae_bands}; only the full decoder runs in bands"
        )
    return request


def decoder_of(request: Request) -> str:
    """The component that decodes."""
    return DECODERS[request.decoder or "full"]


def tile_for(component: Component, size: Size, numbers: Numbers, most: int | None) -> Size:
    """The (height, width) in latent cells that a VAE component computes at a time, for a picture of `size` cells.

    That is `size` itself, unless `most` allows no more than that many pixels squared, or every graph is fixed to less.
    Of several graphs, the largest that may be used. Raises InvalidRequest when there is none.
    """
    factor = numbers.vae_factor
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < LEAST * factor):
        raise InvalidRequest("vae_tile", f"vae_tile is {most!r}; give at least {LEAST * factor} pixels, or None")
    graphs = [_axes(part, factor) for part in (component, *component.sizes.values())]
    tiles = [tile for axes in graphs if (tile := shape(size, math.prod(size), axes))]
    fixed = ", ".join(_pixels(axes, factor) for axes in graphs)
    if not tiles:
        asked = _pixels(size, factor)
        raise InvalidRequest("width", f"{asked} was asked; {component.name} is fixed to {fixed}: ask for no less")
    if most is not None:
        tiles = [tile for axes in graphs if (tile := shape(size, (most // factor) ** 2, axes))]
    if not tiles:
        raise InvalidRequest(
            "vae_tile", f"vae_tile is {most}, squared; {component.name} is fixed to {fixed}: give more, or None"
        )
    return max(tiles, key=math.prod)


def decode(
    decoder: Component,
    latents: Array,
    numbers: Numbers,
    timings: Timings,
    tile: Size | None = None,
    bands: int | None = None,
) -> Array:
    """Pictures (n, height, width, 3) in about [-1, 1] from denoiser latents (n, channels, h, w).

    One image at a time: decoding is where the memory peaks, and a batch gains no speed on a CPU. With a `tile`, in
    cells, one tile at a time; see `tile_for`. Group norms and attention then see a tile and not the whole, so that the
    picture differs a little. Bringing the tiles' means together, by their overlaps or by a decode of the shrunk
    latents, was measured and left out: it made the difference larger. `bands` of so many rows give what the whole does.
    """
    raw = latents
    if decoder.name != TINY:
        raw = latents / np.float32(numbers.latent_scale) + np.float32(numbers.latent_shift)

    def compute(cells: Array) -> Array:
        feeds = {"latent_sample": cells}
        found = decoder.run(feeds, timings) if bands is None else run_in_bands(decoder, feeds, bands, timings)
        picture: Array = found["sample"]
        wanted = (1, 3, *(axis * numbers.vae_factor for axis in cells.shape[2:]))
        if picture.shape != wanted:
            raise GraphFailed(f"{decoder.name} gave {picture.shape}, not {wanted}; export it again")
        return picture

    size = tile or (raw.shape[2], raw.shape[3])
    rows = np.split(raw, len(raw))
    pictures = np.concatenate([blended(compute, row, size, taken=1, given=numbers.vae_factor) for row in rows])
    return np.ascontiguousarray(pictures.transpose(0, 2, 3, 1))


def encode(
    encoder: Component, images: Array, numbers: Numbers, noise: Noise, timings: Timings, tile: Size | None = None
) -> Array:
    """Denoiser latents, sampled from the posterior of pictures (n, height, width, 3) in [-1, 1].

    One picture gives a sample for each row of `noise`. Tiny autoencoders have no posterior, and graphs of old exporters
    draw the sample themselves: both give "latent_sample", one row for each picture, and `noise` is not asked. `tile` is
    as in `decode`.
    """
    planar = images.transpose(0, 3, 1, 2)
    name = "latent_parameters" if "latent_parameters" in encoder.entry.outputs else "latent_sample"

    def compute(pixels: Array) -> Array:
        cells: Array = encoder.run({"sample": pixels}, timings)[name]
        wanted = tuple(axis // numbers.vae_factor for axis in pixels.shape[2:])
        if cells.shape[2:] != wanted:
            raise GraphFailed(f"{encoder.name} gave {cells.shape[2:]} latents, not {wanted}; export it again")
        return cells

    size = tile or (images.shape[1] // numbers.vae_factor, images.shape[2] // numbers.vae_factor)
    rows = np.split(planar, len(planar))
    latents = np.concatenate([blended(compute, row, size, taken=numbers.vae_factor, given=1) for row in rows])
    if name == "latent_parameters":
        mean, log_variance = np.split(latents, 2, axis=1)
        # The clip is the one of the Gaussian posterior in Diffusers' AutoencoderKL.
        deviation = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))
        latents = mean + deviation * noise()
    return np.asarray((latents - numbers.latent_shift) * numbers.latent_scale, np.float32)


def preview(denoised: Array, latent_rgb: tuple[tuple[float, float, float], ...]) -> Array:
    """A rough picture (n, h, w, 3) in [-1, 1], one pixel per latent cell, by a linear map fitted at export."""
    matrix = np.asarray(latent_rgb, np.float32)
    colours: Array = np.einsum("nchw,ck->nhwk", denoised, matrix[:-1]) + matrix[-1]
    return colours


def _axes(component: Component, factor: int) -> Axes:
    inputs = component.entry.inputs
    declared, unit = (inputs["latent_sample"], 1) if "latent_sample" in inputs else (inputs["sample"], factor)
    height, width = (axis // unit if isinstance(axis, int) else None for axis in declared.shape[2:])
    return height, width


def _pixels(axes: Axes, factor: int) -> str:
    return "x".join("any" if axis is None else str(axis * factor) for axis in reversed(axes))
