"""Architectures as data: what the checkpoints' published config.json files say beyond the classes' defaults.

To add one of a known family, add an entry to `ARCHITECTURES`. Parameter counts in tests are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Config = dict[str, Any]

CROSS, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of checkpoint, without weights."""

    unet: Config
    vae: Config
    """`_class_name` if it is no `AutoencoderKL`."""
    text_encoder: Config
    """`CLIPTextConfig`."""
    scheduler: Config
    """With `_class_name`."""
    pipeline: str = "StableDiffusionPipeline"
    pad_token: str = END
    text_encoder_2: Config | None = None
    """`CLIPTextConfig` of the encoder with a projection, or None."""
    extra: Config = field(default_factory=dict)
    """Further arguments of the pipeline's class."""


_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_PNDM = {"_class_name": "PNDMScheduler", **_NOISE, "skip_prk_steps": True, "set_alpha_to_one": False}
_DDIM_V = {"_class_name": "DDIMScheduler", **_NOISE, "set_alpha_to_one": False, "clip_sample": False}
_DDIM_V |= {"prediction_type": "v_prediction"}
_EULER = {"_class_name": "EulerDiscreteScheduler", **_NOISE}
_EULER_A = {"_class_name": "EulerAncestralDiscreteScheduler", **_NOISE}
_TRAILING = {"timestep_spacing": "trailing"}

_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_TAESD = {"_class_name": "AutoencoderTiny"}  # that class's defaults are the published model's
_TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1, "vocab_size": 49408}
_CLIP_L = {
    **_TOKENS,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_OPEN_CLIP_H = {
    **_TOKENS,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPEN_CLIP_G = {
    **_TOKENS,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

_UNET_1 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [CROSS, CROSS, CROSS, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", UP, UP, UP],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_UNET_2 = _UNET_1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_UNET_SMALL = _UNET_1 | {"layers_per_block": 1, "mid_block_type": None}
_UNET_TINY = _UNET_SMALL | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [CROSS] * 3,
    "up_block_types": [UP] * 3,
}
_UNET_XL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", CROSS, CROSS],
    "up_block_types": [UP, UP, "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_SD15 = Architecture(_UNET_1, _VAE, _CLIP_L, _PNDM)
_SD21 = Architecture(_UNET_2 | {"sample_size": 96}, _VAE | {"sample_size": 768}, _OPEN_CLIP_H, _DDIM_V, pad_token="!")
_SD_TURBO = replace(_SD21, unet=_UNET_2, scheduler=_EULER | _TRAILING)
_UNET_SSD = _UNET_XL | {
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
_UNET_VEGA = _UNET_XL | {"transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D"}

_SDXL = Architecture(
    _UNET_XL,
    _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    _CLIP_L,
    _EULER,
    pipeline="StableDiffusionXLPipeline",
    text_encoder_2=_OPEN_CLIP_G,
    extra={"force_zeros_for_empty_prompt": True},
)

ARCHITECTURES = {
    "sd15": _SD15,
    "sd15-taesd": replace(_SD15, vae=_TAESD),
    "sd15-inpaint": replace(_SD15, unet=_UNET_1 | {"in_channels": 9}, pipeline="StableDiffusionInpaintPipeline"),
    "sd15-pix2pix": replace(
        _SD15, unet=_UNET_1 | {"in_channels": 8}, pipeline="StableDiffusionInstructPix2PixPipeline"
    ),
    "sd21": _SD21,
    "sd21-base": replace(_SD21, unet=_UNET_2, scheduler=_PNDM),
    "sd-turbo": _SD_TURBO,
    "sd-turbo-taesd": replace(_SD_TURBO, vae=_TAESD),
    "bk-sdm-base": replace(_SD15, unet=_UNET_1 | {"layers_per_block": 1}),
    "bk-sdm-small": replace(_SD15, unet=_UNET_SMALL),
    "bk-sdm-tiny": replace(_SD15, unet=_UNET_TINY),
    "tiny-sd": replace(_SD15, unet=_UNET_TINY, scheduler={"_class_name": "DPMSolverMultistepScheduler", **_NOISE}),
    "lcm": replace(
        _SD15,
        unet=_UNET_1 | {"time_cond_proj_dim": 256},
        scheduler={"_class_name": "LCMScheduler", **_NOISE, "clip_sample": False},
        pipeline="LatentConsistencyModelPipeline",
    ),
    "sdxl": _SDXL,
    "sdxl-lightning": replace(_SDXL, scheduler=_EULER | _TRAILING),
    "sdxl-turbo": replace(_SDXL, unet=_UNET_XL | {"sample_size": 64}, scheduler=_EULER_A | _TRAILING),
    "sdxl-inpaint": replace(_SDXL, unet=_UNET_XL | {"in_channels": 9}, pipeline="StableDiffusionXLInpaintPipeline"),
    "ssd-1b": replace(_SDXL, unet=_UNET_SSD),
    "segmind-vega": replace(_SDXL, unet=_UNET_VEGA),
}
