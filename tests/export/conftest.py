"""A tiny Stable Diffusion pipeline with seeded random weights, in Diffusers' folder format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
MERGES = ["r e", "re d</w>", "a p", "ap p", "l e</w>", "app le</w>", "c a", "ca t</w>"]


def write_tokenizer(folder: Path) -> None:
    letters = [chr(byte) for byte in BYTES] + [chr(256 + index) for index in range(256 - len(BYTES))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "pad_token": "<|endoftext|>"}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-level SD pipeline: 32x32 pixels, latents 16x16, attention in UNet and VAE."""
    for name in ("torch", "diffusers", "transformers", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _make_tiny(tmp_path_factory.mktemp("tiny") / "source")


def _make_tiny(folder: Path) -> Path:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.set_num_threads(1)  # threads of tiny models wait for each other on a busy machine
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few steps and prompts, to keep tests short."""
    folder = tmp_path_factory.mktemp("preset")
    (folder / "ATTRIBUTIONS.md").write_text("nobody\n", encoding="utf-8")
    file = folder / "preset.toml"
    file.write_text(
        'name = "tiny"\nprompts = ["red apple", "cat"]\nfiles = ["ATTRIBUTIONS.md"]\n'
        '[source]\nlicence = "CC0-1.0"\n[numbers]\ndefault_steps = 4\ndefault_guidance = 3\n',
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="module")
def twins(request: pytest.FixtureRequest, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the test file's own `make` gives, and its export; see `family_sources`."""
    from .family_sources import Twins

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Twins.of(tmp_path_factory.mktemp("family"), request.module.make, preset)


@pytest.fixture(scope="module")
def theirs(twins: Any) -> Any:
    """Diffusers' pipeline."""
    return twins.theirs


@pytest.fixture(scope="module")
def made(twins: Any) -> Any:
    """What the export says of the bundle."""
    return twins.made


@pytest.fixture(scope="module")
def ours(twins: Any) -> Any:
    """The bundle's pipeline on every device."""
    return twins.ours
