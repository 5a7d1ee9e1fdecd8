"""What a generation gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion import image
from pocketdiffusion.image.metadata import Parameters
from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion.timing import Timings


@dataclass(frozen=True, slots=True)
class ComponentUse:
    """How one graph really ran."""

    engine: str
    """Backend and version, e.g. "onnxruntime 1.31.1"."""
    device: str
    """e.g. "onnxruntime:cpu"."""
    precision: str
    """Arithmetic really used."""
    weights: str
    """How the weights are stored."""


@dataclass(frozen=True, slots=True)
class Result:
    """Pictures and how they came about."""

    images: Any
    """By output_type: a list of PIL images ("pil"), float32 (n, h, w, 3) in [0, 1] ("np"), or latents ("latent")."""
    seeds: tuple[int, ...]
    """One for each image; it makes the same image alone, unless one generator was given for several images."""
    timings: Timings
    """Raw samples in seconds: text_encode, step, vae_decode, total, and each component's own runs and opening."""
    configuration: Mapping[str, ComponentUse]
    parameters: tuple[Parameters, ...]
    """What saved files say about each image."""
    digital_source: str
    """IPTC digital source type of the images."""
    pixels: AnyArray | None
    """uint8 (n, h, w, 3); None for output_type "latent"."""
    latents: Array
    """Final latents in the denoiser's coordinates."""
    messages: tuple[str, ...] = ()
    nsfw_content_detected: None = None
    """No bundle of this version contains a checker; the field has Diffusers' name."""

    def save(self, pattern: str | Path, *, with_prompt: bool = True, quality: int = 95) -> list[Path]:
        """Write the images as PNG, JPEG or WebP by the pattern's suffix; see `image.output_path` for its fields."""
        return image.save_all(self, str(pattern), with_prompt=with_prompt, quality=quality)
