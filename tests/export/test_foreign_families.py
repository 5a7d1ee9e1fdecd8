"""optimum's folders of other families than plain Stable Diffusion make Diffusers' images, unmodified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")
main_export = pytest.importorskip("optimum.exporters.onnx").main_export

from pocketdiffusion import Pipeline  # noqa: E402

from . import family_sources as tiny  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def exported(folder: Path, task: str) -> dict[str, Pipeline]:
    main_export(str(folder / "source"), folder / "onnx", task=task, do_validation=False)
    return tiny.opened(folder / "onnx")


def test_lcm_with_guidance_as_an_input(tmp_path: Path) -> None:
    scheduler = diffusers.LCMScheduler(**tiny.NOISE, clip_sample=False, set_alpha_to_one=True)
    changes = {"time_cond_proj_dim": 16}
    kind = diffusers.LatentConsistencyModelPipeline
    theirs = tiny.sd(tmp_path / "source", kind, scheduler, unet_changes=changes)
    for ours in exported(tmp_path, "text-to-image").values():
        numbers = ours.bundle.manifest.numbers
        assert (numbers.default_steps, numbers.default_guidance) == (4, 8.5)
        assert tiny.compare(ours, theirs, num_inference_steps=4, guidance_scale=8.5) >= 50


def test_inpainting_with_nine_channels(tmp_path: Path) -> None:
    from PIL import Image

    kind, scheduler = diffusers.StableDiffusionInpaintPipeline, diffusers.DDIMScheduler(**tiny.NOISE, clip_sample=False)
    theirs = tiny.sd(tmp_path / "source", kind, scheduler, unet_changes={"in_channels": 9})
    ours = exported(tmp_path, "inpainting")[tiny.DEVICES[0]]
    assert ours.bundle.manifest.tasks == ("inpaint",)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    given = {"image": Image.fromarray(pixels), "mask_image": Image.fromarray(mask)}
    sizes = {"height": 32, "width": 32}
    expected = theirs(
        "red apple", generator=tiny.generator(7), num_inference_steps=20, output_type="np", **given, **sizes
    )
    found = ours("red apple", seed=7, num_inference_steps=20, output_type="np", **given)
    inside = np.s_[8:24, 8:24]  # Diffusers leaves the rest to the VAE, the runtime to the picture
    from pocketdiffusion.verify import psnr_db

    assert psnr_db(np.round(expected.images[0][inside] * 255), np.round(found.images[0][inside] * 255)) >= 50


def test_sdxl(tmp_path: Path) -> None:
    theirs = sdxl(tmp_path / "source")
    for ours in exported(tmp_path, "text-to-image").values():
        assert ours.bundle.manifest.family == "sdxl"
        assert tiny.compare(ours, theirs, guidance_scale=5.0, height=32, width=32) >= 50


def sdxl(source: Path) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = [tiny.tokenizer(source / name) for name in ("tokenizer", "tokenizer_2")]
    second = tiny.text_config(words[1], hidden_size=48, projection_dim=24, hidden_act="gelu")
    embedding = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = tiny.unet(cross_attention_dim=80, projection_class_embeddings_input_dim=6 * 8 + 24, **embedding)
    pipe = tiny.seeded(
        diffusers.StableDiffusionXLPipeline,
        vae=tiny.vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(tiny.text_config(words[0])).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=words[0],
        tokenizer_2=words[1],
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(**tiny.NOISE, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    pipe.save_pretrained(str(source))
    return pipe
