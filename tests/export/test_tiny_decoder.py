"""A tiny decoder beside the full one: exported with a source, or added to a bundle; against Diffusers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import SessionOptions  # noqa: E402
from pocketdiffusion.bundle import Bundle  # noqa: E402
from pocketdiffusion.verify import verify  # noqa: E402
from pocketdiffusion_export.additions import add_tiny_vae  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.source import load  # noqa: E402
from pocketdiffusion_export.sources.tiny_vae import load as load_tiny  # noqa: E402

from . import family_sources as sources  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

TINY = "tiny_vae_decoder"


def tiny_vae(channels: int = 4, **changes: Any) -> Any:
    """One of two pixels per cell, with a latent scale of its own."""
    torch.manual_seed(3)
    facts = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    facts |= {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1), "scaling_factor": 1.6, **changes}
    return diffusers.AutoencoderTiny(latent_channels=channels, **facts).eval()


def make(folder: Path) -> Any:
    pipe = sources.sd(folder, diffusers.StableDiffusionPipeline)
    tiny_vae().save_pretrained(str(folder / "tiny_vae"))
    return pipe


def quiet(line: str) -> None:
    pass


def test_it_is_verified_as_all_components_are(made: Any, twins: Any) -> None:
    assert {item.engine for item in made.measured if item.component == TINY} == {"onnxruntime", "openvino"}
    assert min(item.sqnr_db for item in made.measured) >= 60
    bundle = Bundle.open(twins.folder / "bundle")
    config = json.loads((bundle.path / TINY / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == "AutoencoderTiny"
    assert "tiny_vae/diffusion_pytorch_model.safetensors" in made.manifest.source.sha256
    checks = list(verify(bundle, "onnxruntime:cpu", SessionOptions()))
    assert TINY in [check.subject for check in checks] and all(check.passed for check in checks)


@pytest.mark.parametrize("device", sources.DEVICES)
def test_the_same_image_as_diffusers_with_the_tiny_vae(ours: dict[str, Pipeline], theirs: Any, device: str) -> None:
    parts = theirs.components | {"vae": tiny_vae()}
    theirs_tiny = sources.seeded(diffusers.StableDiffusionPipeline, **parts, requires_safety_checker=False)
    assert sources.compare(ours[device], theirs, guidance_scale=5.0) >= 50
    found = ours[device]("red apple", seed=7, num_inference_steps=4, decoder="tiny", output_type="np").images[0]
    size = {"guidance_scale": ours[device].bundle.manifest.numbers.default_guidance, "output_type": "np"}
    expected = theirs_tiny("red apple", generator=sources.generator(7), num_inference_steps=4, **size).images[0]
    assert sources.psnr_db(np.round(expected * 255), np.round(found * 255)) >= 50


def test_optimum_loads_the_bundle(twins: Any) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    pipe = optimum.ORTDiffusionPipeline.from_pretrained(str(twins.folder / "bundle"))
    pipe.set_progress_bar_config(disable=True)
    assert sources.compare(twins.ours["onnxruntime:cpu"], pipe, guidance_scale=5.0, height=32, width=32) >= 50


@pytest.mark.parametrize(
    ("target", "recipe", "size"),
    [("onnx", "fp32", "dynamic"), pytest.param("openvino", "w8a8", "32x32", marks=pytest.mark.slow)],
)
def test_a_bundle_gets_one(twins: Any, preset: Path, tmp_path: Path, target: str, recipe: str, size: str) -> None:
    source, tiny = tmp_path / "source", str(twins.folder / "source" / "tiny_vae")
    shutil.copytree(twins.folder / "source", source, ignore=shutil.ignore_patterns("tiny_vae"))
    plan = make_plan(source, tmp_path / "without", target=target, recipe=recipe, size=size, preset=preset)
    export(plan, quiet)
    before = Bundle.open(tmp_path / "without")
    add_tiny_vae(before.path, tmp_path / "with", tiny, quiet)
    after = Bundle.open(tmp_path / "with")
    assert set(after.manifest.components) == {*before.manifest.components, TINY}
    hashes = {file.path: file.sha256 for file in after.manifest.files}
    assert all(hashes[file.path] == file.sha256 for file in before.manifest.files if "/" in file.path)
    assert all(check.passed for check in verify(after, "openvino:cpu", SessionOptions()))
    made = Pipeline.from_pretrained(after.path, device="openvino:cpu")
    fields: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "decoder": "tiny"}
    latents = made("red apple", output_type="latent", **fields).images
    with torch.inference_mode():
        pixels = tiny_vae().decode(torch.from_numpy(latents / 1.6)).sample.numpy().transpose(0, 2, 3, 1)
    found = made("red apple", output_type="np", **fields).images
    assert sources.psnr_db((pixels / 2 + 0.5).clip(0, 1) * 255, found * 255) >= (50 if recipe == "fp32" else 30)
    assert TINY in (after.path / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ExportError, match=f"has a {TINY} already"):
        add_tiny_vae(after.path, tmp_path / "twice", tiny, quiet)


def test_a_tiny_vae_for_other_latents_is_refused(twins: Any, tmp_path: Path) -> None:
    tiny_vae(channels=8).save_pretrained(str(tmp_path / "tiny"))
    with pytest.raises(ExportError, match="takes latents of 8 channels and makes 2x2 pixels .* model's have 4 and 2x2"):
        export(make_plan(twins.folder / "source", tmp_path / "x", tiny_vae=str(tmp_path / "tiny")), quiet)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none", "none is no folder with a config.json; give a Diffusers folder of an AutoencoderTiny"),
        ("vae", "vae is a AutoencoderKL; give the folder of an AutoencoderTiny, or random:taesd"),
    ],
)
def test_what_is_no_tiny_vae_is_refused(twins: Any, given: str, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        load_tiny(str(twins.folder / "source" / given))


def test_a_random_one_has_the_size_of_taesd() -> None:
    model, hashes = load_tiny("random:taesd")
    assert hashes == {} and sum(tensor.numel() for tensor in model.parameters()) == 2_445_063
    with pytest.raises(ExportError, match="unknown tiny VAE 'random:vae'; choose random:taesd"):
        load_tiny("random:vae")


def test_a_source_without_one_gets_it_by_a_flag(tmp_path: Path) -> None:
    sources.sd(tmp_path / "source", diffusers.StableDiffusionPipeline)
    assert not hasattr(load(str(tmp_path / "source")).pipe, "tiny_vae")
    tiny_vae().save_pretrained(str(tmp_path / "tiny"))
    assert load(str(tmp_path / "source"), str(tmp_path / "tiny")).pipe.tiny_vae.config.scaling_factor == 1.6
