"""A model's numbers, from the configs of a foreign folder and the shapes of its graphs.

What a fixed shape says counts before what a config says. Diffusers' legacy folders have neither for most numbers; there
the constants of Stable Diffusion 1.x apply, as they do in Diffusers' own `OnnxStableDiffusionPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketdiffusion.bundle.foreign.configs import Configs
from pocketdiffusion.bundle.manifest import ComponentEntry, Numbers
from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleCorrupt

SCALING_FACTOR = 0.18215
"""Of Stable Diffusion's autoencoder; old exporters left it out."""
CHANNELS, LEVELS, SAMPLE_SIZE, TEXT_LENGTH = 4, 4, 64, 77
STEPS, GUIDANCE = 25, 7.5
FEW_STEPS, NO_GUIDANCE = 4, 1.0
BUILT_IN_GUIDANCE = 8.5
"""For denoisers that are told the scale (LCM; arXiv:2310.04378), as in Diffusers' pipeline for them."""
_MAX_TEXT = 65536


def make_numbers(root: Path, configs: Configs, components: Mapping[str, ComponentEntry], *, few_steps: bool) -> Numbers:
    """The numbers of the folder `root`. Raises BundleCorrupt where a config's value is out of range."""
    vae, vae_file = _vae(configs)
    unet = configs.read("unet/config.json")
    sample = components["unet"].inputs["sample"].shape
    factor = 2 ** (_levels(vae, vae_file) - 1)
    multiple = factor * 2 ** (_levels(unet, "unet/config.json") - 1)
    sizes = _sample_size(unet)
    height, width = (
        axis * factor if isinstance(axis, int) else max(size * factor // multiple, 1) * multiple
        for axis, size in zip(sample[2:], sizes, strict=True)
    )
    fixed = any(isinstance(axis, int) for axis in sample[2:])
    return Numbers(
        width=width,
        height=height,
        latent_channels=_latent_channels(vae, vae_file, components),
        latent_scale=_number(vae, "scaling_factor", SCALING_FACTOR, vae_file, (1e-6, 1e6)),
        latent_shift=_number(vae, "shift_factor", 0.0, vae_file, (-1e6, 1e6)),
        vae_factor=factor,
        size_multiple=factor if fixed else multiple,
        text_length=_text_length(configs, components),
        default_steps=FEW_STEPS if few_steps else STEPS,
        default_guidance=_guidance(components, few_steps=few_steps),
    )


def _guidance(components: Mapping[str, ComponentEntry], *, few_steps: bool) -> float:
    if "timestep_cond" in components["unet"].inputs:
        return BUILT_IN_GUIDANCE
    return NO_GUIDANCE if few_steps else GUIDANCE


def _vae(configs: Configs) -> tuple[dict[str, Any], str]:
    files = [f"{folder}/config.json" for folder in ("vae_decoder", "vae", "vae_encoder")]
    return next(((config, file) for file in files if (config := configs.read(file))), ({}, files[0]))


def _levels(config: dict[str, Any], file: str) -> int:
    """Levels of a U-shaped network; each but the last halves the picture."""
    blocks = config.get("block_out_channels")
    if blocks is None:
        return LEVELS
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 8:
        raise BundleCorrupt(file, f"block_out_channels is {short(blocks)}, allowed: a list of 1 to 8 numbers")
    return len(blocks)


def _sample_size(unet: dict[str, Any]) -> tuple[int, int]:
    """Native height and width in latent cells."""
    size = unet.get("sample_size")
    if size is None:
        return SAMPLE_SIZE, SAMPLE_SIZE
    pair: list[Any] = size if isinstance(size, list) else [size, size]
    if len(pair) != 2 or any(type(side) is not int or not 1 <= side <= 2048 for side in pair):
        raise BundleCorrupt("unet/config.json", f"sample_size is {short(size)}, allowed: one or two from 1 to 2048")
    return pair[0], pair[1]


def _latent_channels(vae: dict[str, Any], file: str, components: Mapping[str, ComponentEntry]) -> int:
    axis = components["vae_decoder"].inputs["latent_sample"].shape[1]
    if isinstance(axis, int) and axis <= 1024:
        return axis
    return int(_number(vae, "latent_channels", CHANNELS, file, (1, 1024)))


def _text_length(configs: Configs, components: Mapping[str, ComponentEntry]) -> int:
    axis = components["text_encoder"].inputs["input_ids"].shape[1]
    if isinstance(axis, int) and axis <= _MAX_TEXT:
        return axis
    for file, key in (
        ("tokenizer/tokenizer_config.json", "model_max_length"),
        ("text_encoder/config.json", "max_position_embeddings"),
    ):
        value = configs.read(file).get(key)
        if isinstance(value, int) and 3 <= value <= _MAX_TEXT:
            return value
    return TEXT_LENGTH


def _number(config: dict[str, Any], key: str, default: float, file: str, allowed: tuple[float, float]) -> float:
    value = config.get(key)
    if value is None:
        return float(default)
    low, high = allowed
    if type(value) not in (int, float) or not low <= value <= high:
        raise BundleCorrupt(file, f"{key} is {short(value)}, allowed: a number from {low:g} to {high:g}")
    return float(value)
