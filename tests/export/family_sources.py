"""Tiny Diffusers pipelines of every family with seeded random weights, in Diffusers' folder format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pocketdiffusion import Pipeline
from pocketdiffusion.verify import psnr_db
from pocketdiffusion_export.export import Made, export
from pocketdiffusion_export.plan import make_plan

from .conftest import write_tokenizer

STEPS = 20
DEVICES = ("onnxruntime:cpu", "openvino:cpu")
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def text_config(tokenizer: Any, **changes: Any) -> Any:
    from transformers import CLIPTextConfig

    facts = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **{**facts, **ids, **changes})


def tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(str(folder))


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    facts: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**facts, **changes})


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    facts: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 32,
    }
    return AutoencoderKL(**{**facts, **changes})


def seeded(kind: type, **fields: Any) -> Any:
    """A pipeline without progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind(**fields)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(folder: Path, kind: type, scheduler: Any, *, unet_changes: dict[str, Any] | None = None, **parts: Any) -> Any:
    """A pipeline of the SD kind, saved in `folder`."""
    import torch
    from transformers import CLIPTextModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    pipe = seeded(
        kind,
        vae=parts.pop("vae", None) or vae(),
        text_encoder=CLIPTextModel(text_config(words)).eval(),
        tokenizer=words,
        unet=unet(**(unet_changes or {})).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(str(folder))
    return pipe


def exported(source: Path, folder: Path, preset: Path) -> Made:
    """An fp32 ONNX bundle."""
    (made,) = export(make_plan(source, folder, recipe="fp32", preset=preset), lambda line: None).bundles
    return made


def opened(folder: Path) -> dict[str, Pipeline]:
    """The bundle on every device."""
    return {device: Pipeline.from_pretrained(folder, device=device) for device in DEVICES}


def generator(seed: int) -> Any:
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def compare(ours: Pipeline, theirs: Any, **fields: Any) -> float:
    """PSNR of one image of each, same seed."""
    common = {"num_inference_steps": STEPS, "output_type": "np", **fields}
    expected = theirs("red apple", generator=generator(7), **common).images[0]
    found = ours("red apple", seed=7, **common).images[0]
    return psnr_db(np.round(expected * 255), np.round(found * 255))
