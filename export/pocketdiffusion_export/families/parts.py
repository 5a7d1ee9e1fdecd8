"""UNet and VAE as graphs, with optimum's names of inputs and outputs.

Limits: UNets conditioned by text, by SDXL's pooled text and size ids, and by a guidance embedding; no class labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pocketdiffusion.presets import DECODERS
from pocketdiffusion_export.component import Call, ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families import TINY_VAE
from pocketdiffusion_export.forms import fused_attention

TEXT_TIME = ("text_embeds", "time_ids")
IDS = 6
"""SDXL's size ids: original height and width, top and left of the crop, target height and width."""


def config_of(model: Any) -> dict[str, Any]:
    """A model's config without paths."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return {key: value for key, value in sorted(config.items()) if key != "_name_or_path"}


def unet_inputs(config: Any) -> tuple[str, ...]:
    """Names of a UNet's inputs. Raises ExportError for conditioning that is not known."""
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if getattr(config, name, None) is not None:
            raise ExportError(f"a UNet with '{name}' ({getattr(config, name)}) can't be exported yet")
    added = getattr(config, "addition_embed_type", None)
    if added not in (None, "text_time"):
        raise ExportError(f"a UNet with addition_embed_type '{added}' can't be exported yet; known: text_time")
    guidance = () if config.time_cond_proj_dim is None else ("timestep_cond",)
    return ("sample", "timestep", "encoder_hidden_states", *(TEXT_TIME if added else ()), *guidance)


def unet_feeds(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]) -> Feeds:
    """Inputs by name from a call of a Diffusers UNet."""
    known = {"sample": args[0], "timestep": args[1].float(), **kwargs, **(kwargs.get("added_cond_kwargs") or {})}
    return {name: known[name].float().numpy().copy() for name in names}


def unet(pipe: Any) -> ComponentSpec:
    """The denoiser."""
    model, config = pipe.unet, pipe.unet.config
    names = unet_inputs(config)
    image, rows = {0: "batch", 2: "height", 3: "width"}, {0: "batch"}
    length = pipe.text_encoder.config.max_position_embeddings
    side = 2 ** len(config.block_out_channels)  # 2x2 at the lowest level: the graph is that of any size
    examples = {
        "sample": torch.zeros(2, config.in_channels, side, side),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.zeros(2, length, config.cross_attention_dim),
    }
    if "text_embeds" in names:
        examples["time_ids"] = torch.zeros(2, IDS)
        examples["text_embeds"] = torch.zeros(2, pipe.text_encoder_2.config.projection_dim)
    if "timestep_cond" in names:
        examples["timestep_cond"] = torch.zeros(2, config.time_cond_proj_dim)
    axes = {"sample": image, "encoder_hidden_states": rows | {1: "length"}, "out_sample": image}
    axes |= {name: rows for name in names[3:]}

    def run(*inputs: torch.Tensor) -> Any:
        given = dict(zip(names, inputs, strict=True))
        added = {name: given.pop(name) for name in TEXT_TIME if name in given}
        return model(**given, added_cond_kwargs=added or None, return_dict=False)[0]

    return image_model(
        "unet",
        model,
        run,
        inputs=names,
        output="out_sample",
        axes=axes,
        example=tuple(examples[name] for name in names),
    )


def vae_decoder(vae: Any) -> ComponentSpec:
    """Latents, unscaled, to pictures in about [-1, 1]."""
    return _decoder(DECODERS["full"], vae, lambda latents: vae.decode(latents, return_dict=False)[0])


def _decoder(name: str, vae: Any, decode: Callable[..., torch.Tensor]) -> ComponentSpec:
    return image_model(
        name,
        vae,
        decode,
        inputs=("latent_sample",),
        output="sample",
        axes={
            "latent_sample": {0: "batch", 2: "height_latent", 3: "width_latent"},
            "sample": {0: "batch", 2: "height", 3: "width"},
        },
        example=(torch.zeros(2, vae.config.latent_channels, 16, 16),),
    )


def tiny_vae_decoder(pipe: Any) -> tuple[ComponentSpec, ...]:
    """The decoder of the pipeline's `tiny_vae`, or none: the denoiser's latents to pictures in about [-1, 1].

    It takes those latents whatever the full VAE's scale is; a scale of its own is in the graph. Raises ExportError for
    one made for other latents.
    """
    tiny = getattr(pipe, TINY_VAE, None)
    if tiny is None:
        return ()
    check_tiny_vae(tiny, pipe.vae.config.latent_channels, vae_factor(pipe.vae))
    return (tiny_decoder(tiny),)


def check_tiny_vae(tiny: Any, channels: int, factor: int) -> None:
    """Raise ExportError unless a tiny VAE is for latents of so many channels and pixels per cell."""
    found = tiny.config.latent_channels, vae_factor(tiny)
    if found != (channels, factor):
        raise ExportError(
            "the tiny VAE takes latents of {} channels and makes {}x{} pixels of a cell; ".format(*found, found[1])
            + f"this model's have {channels} and {factor}x{factor}: give the tiny VAE that was made for it"
        )


def tiny_decoder(tiny: Any) -> ComponentSpec:
    """The graph of a tiny VAE's decoder."""
    scale, shift = tiny.config.scaling_factor, getattr(tiny.config, "shift_factor", None) or 0.0

    def decode(latents: torch.Tensor) -> torch.Tensor:
        own = latents if (scale, shift) == (1.0, 0.0) else latents / scale + shift
        decoded: torch.Tensor = tiny.decode(own, return_dict=False)[0]
        return decoded

    return _decoder(DECODERS["tiny"], tiny, decode)


def vae_encoder(vae: Any) -> ComponentSpec:
    """Pictures in [-1, 1] to the mean and log variance of their latents, or of a tiny autoencoder to the latents."""
    side, tiny = 16 * vae_factor(vae), hasattr(vae.config, "encoder_block_out_channels")
    output = "latent_sample" if tiny else "latent_parameters"

    def run(images: torch.Tensor) -> Any:
        encoded = vae.encode(images)
        return encoded.latents if tiny else encoded.latent_dist.parameters

    return image_model(
        "vae_encoder",
        vae,
        run,
        inputs=("sample",),
        output=output,
        axes={
            "sample": {0: "batch", 2: "height", 3: "width"},
            output: {0: "batch", 2: "height_latent", 3: "width_latent"},
        },
        example=(torch.zeros(2, vae.config.in_channels, side, side),),
    )


def vae_factor(vae: Any) -> int:
    """Pixels per latent cell, along one side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def image_model(
    name: str,
    model: Any,
    function: Callable[..., torch.Tensor],
    *,
    inputs: tuple[str, ...],
    output: str,
    axes: Mapping[str, Mapping[int, str]],
    example: tuple[torch.Tensor, ...],
) -> ComponentSpec:
    """A Diffusers model with one output, which runs as it is and is traced with fused attention."""
    return ComponentSpec(
        name=name,
        module=Call(model, function),
        reference=lambda *tensors: (function(*tensors),),
        inputs=inputs,
        outputs=(output,),
        axes=axes,
        example=example,
        config=config_of(model),
        form=lambda: fused_attention(model),
    )


def other_shape(feeds: Feeds, count: int = 3) -> Feeds:
    """Several images of half the width, and twice the text: axes that tracing fixed do not take them."""
    rows = {name: array if array.ndim == 0 else np.repeat(array[:1], count, 0) for name, array in feeds.items()}
    images = {name: array[:, :, :, : array.shape[3] // 2] for name, array in rows.items() if array.ndim == 4}
    texts = {name: np.concatenate([array, array], 1) for name, array in rows.items() if array.ndim == 3}
    return rows | images | texts
