"""Latents to pictures and back, through the bundle's VAE graphs."""

from __future__ import annotations

import numpy as np

from pocketdiffusion.bundle.manifest import Numbers
from pocketdiffusion.component import Component
from pocketdiffusion.errors import GraphFailed
from pocketdiffusion.tensors import Array, Noise
from pocketdiffusion.timing import Timings


def decode(decoder: Component, latents: Array, numbers: Numbers, timings: Timings) -> Array:
    """Pictures (n, height, width, 3) in about [-1, 1] from denoiser latents (n, channels, h, w).

    One image at a time: decoding is where the memory peaks, and a batch gains no speed on a CPU.
    """
    raw = latents / np.float32(numbers.latent_scale) + np.float32(numbers.latent_shift)
    pictures = [decoder.run({"latent_sample": raw[i : i + 1]}, timings)["sample"] for i in range(len(raw))]
    height, width = (size * numbers.vae_factor for size in raw.shape[2:])
    if any(picture.shape != (1, 3, height, width) for picture in pictures):
        raise GraphFailed(f"{decoder.name} gave {pictures[0].shape}, not (1, 3, {height}, {width}); export it again")
    return np.ascontiguousarray(np.concatenate(pictures).transpose(0, 2, 3, 1), dtype=np.float32)


def encode(encoder: Component, images: Array, numbers: Numbers, noise: Noise, timings: Timings) -> Array:
    """Denoiser latents, sampled from the posterior of pictures (n, height, width, 3) in [-1, 1].

    One picture gives a sample for each row of `noise`. Tiny autoencoders have no posterior, and graphs of old exporters
    draw the sample themselves: both give "latent_sample", one row for each picture, and `noise` is not asked.
    """
    planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    name = "latent_parameters" if "latent_parameters" in encoder.entry.outputs else "latent_sample"
    latents = np.concatenate([encoder.run({"sample": planar[i : i + 1]}, timings)[name] for i in range(len(planar))])
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
