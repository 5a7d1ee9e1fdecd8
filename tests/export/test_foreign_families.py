"""optimum's folders of other families than plain Stable Diffusion make Diffusers' images, unmodified."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
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
    kind, scheduler = diffusers.StableDiffusionInpaintPipeline, diffusers.DDIMScheduler(**tiny.NOISE, clip_sample=False)
    theirs = tiny.sd(tmp_path / "source", kind, scheduler, unet_changes={"in_channels": 9})
    ours = exported(tmp_path, "inpainting")[tiny.DEVICES[0]]
    assert ours.bundle.manifest.tasks == ("inpaint",)
    assert tiny.compare(ours, theirs, only_theirs=tiny.SIZE, image=tiny.PICTURE, mask_image=tiny.MASK) >= 50


def test_sdxl(tmp_path: Path) -> None:
    theirs = tiny.sdxl(tmp_path / "source")
    for ours in exported(tmp_path, "text-to-image").values():
        assert ours.bundle.manifest.family == "sdxl"
        assert tiny.compare(ours, theirs, guidance_scale=5.0, **tiny.SIZE) >= 50
