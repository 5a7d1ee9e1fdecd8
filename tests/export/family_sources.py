"""Tiny Diffusers pipelines of every family with seeded random weights, and the same exported.

A test file of a family has a function `make(folder)` that saves a pipeline in a folder and gives it back; the fixtures
`theirs`, `made` and `ours` (in conftest.py) are that pipeline, its fp32 ONNX bundle, and the bundle on every device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pocketdiffusion import Pipeline
from pocketdiffusion.verify import psnr_db
from pocketdiffusion_export.export import Made, export
from pocketdiffusion_export.plan import make_plan

from .conftest import write_tokenizer

STEPS = 20
DEVICES = ("onnxruntime:cpu", "openvino:cpu")
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIXELS = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
WHITE = np.zeros((32, 32), bool)
WHITE[6:24, 9:28] = True
PICTURE, MASK = Image.fromarray(PIXELS), Image.fromarray(WHITE.astype(np.uint8) * 255)
SIZE = {"width": 32, "height": 32}
"""For Diffusers' pipelines that take the model's native size where the runtime takes the picture's."""


@dataclass(frozen=True)
class Twins:
    """A pipeline of Diffusers, and the same as a bundle."""

    folder: Path
    """Holds "source" and "bundle"."""
    theirs: Any
    made: Made
    ours: dict[str, Pipeline]
    """By device."""

    @classmethod
    def of(cls, folder: Path, make: Callable[[Path], Any], preset: Path) -> Twins:
        theirs = make(folder / "source")
        made = exported(folder / "source", folder / "bundle", preset)
        return cls(folder, theirs, made, opened(folder / "bundle"))


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
    return UNet2DConditionModel(**{**facts, **changes}).eval()


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
    return AutoencoderKL(**{**facts, **changes}).eval()


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)


def seeded(kind: type, **fields: Any) -> Any:
    """A pipeline without progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind(**fields)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(
    folder: Path, kind: type, scheduler: Any = None, *, unet_changes: dict[str, Any] | None = None, **parts: Any
) -> Any:
    """A pipeline of the SD kind, saved in `folder`; DDIM, and no safety checker unless it is among the parts."""
    import torch
    from transformers import CLIPTextModel

    torch.set_num_threads(1)  # threads of tiny models wait for each other on a busy machine
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    made = {
        "vae": parts.pop("vae", None) or vae(),
        "text_encoder": CLIPTextModel(text_config(words)).eval(),
        "tokenizer": words,
        "unet": unet(**(unet_changes or {})),
        "scheduler": scheduler or ddim(),
    }
    checking = {"safety_checker": None, "feature_extractor": None}
    pipe = seeded(kind, **made, **(checking | parts), requires_safety_checker="safety_checker" in parts)
    pipe.save_pretrained(str(folder))
    return pipe


def sdxl(folder: Path, kind: type | None = None, **unet_changes: Any) -> Any:
    """A pipeline of the SDXL kind, saved in `folder`, with two text encoders of different width and depth."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = [tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    words[1].pad_token = "!"
    second = text_config(words[1], hidden_size=48, projection_dim=24, num_hidden_layers=4, hidden_act="gelu")
    facts = {
        "cross_attention_dim": 80,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    }
    pipe = seeded(
        kind or StableDiffusionXLPipeline,
        vae=vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(text_config(words[0])).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=words[0],
        tokenizer_2=words[1],
        unet=unet(**{**facts, **unet_changes}),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
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


def compare(ours: Pipeline, theirs: Any, *, only_theirs: dict[str, Any] | None = None, **fields: Any) -> float:
    """PSNR of one image of each, same seed; with a mask, of what is white in it."""
    common = {"num_inference_steps": STEPS, "output_type": "np", **fields}
    expected = theirs("red apple", generator=generator(7), **common, **(only_theirs or {})).images[0]
    found = ours("red apple", seed=7, **common).images[0]
    where = np.s_[WHITE] if "mask_image" in fields else np.s_[:]
    return psnr_db(np.round(expected[where] * 255), np.round(found[where] * 255))
