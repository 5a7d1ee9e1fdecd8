"""Tiny autoencoders (the shape of TAESD) as a bundle's VAE: latents without a distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402

from . import family_sources as sources  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def make(folder: Path) -> Any:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    )
    scheduler = diffusers.EulerDiscreteScheduler(**sources.NOISE)
    return sources.sd(folder, diffusers.StableDiffusionPipeline, scheduler, vae=vae.eval())


def test_every_component_equals_its_source(made: Any) -> None:
    assert min(item.sqnr_db for item in made.measured) >= 60
    assert list(made.manifest.components["vae_encoder"].outputs) == ["latent_sample"]
    assert (made.manifest.numbers.latent_scale, made.manifest.numbers.vae_factor) == (1.0, 2)


@pytest.mark.parametrize("device", sources.DEVICES)
def test_the_same_image(ours: dict[str, Pipeline], theirs: Any, device: str) -> None:
    assert sources.compare(ours[device], theirs, guidance_scale=5.0) >= 50


@pytest.mark.parametrize("device", sources.DEVICES)
def test_the_same_image_from_an_image(ours: dict[str, Pipeline], theirs: Any, device: str) -> None:
    pipe = sources.seeded(diffusers.StableDiffusionImg2ImgPipeline, **theirs.components, requires_safety_checker=False)
    assert sources.compare(ours[device], pipe, image=sources.PICTURE, strength=0.6, guidance_scale=5.0) >= 50


def test_several_images_from_one(ours: dict[str, Pipeline]) -> None:
    found = ours["onnxruntime:cpu"](
        "cat", seed=0, image=sources.PICTURE, num_images_per_prompt=2, num_inference_steps=4
    )
    assert len(found.images) == 2
