"""Inpainting with plain UNets and with those made for it, against Diffusers' inpainting pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import SessionOptions  # noqa: E402
from pocketdiffusion.errors import BundleUnsupported  # noqa: E402
from pocketdiffusion.verify import psnr_db, verify  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.families.sd import FAMILY  # noqa: E402

from . import family_sources as sources  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
MASK = np.zeros((32, 32), np.uint8)
MASK[6:24, 9:28] = 255


@pytest.fixture(scope="module")
def plain(tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """The 4-channel model."""
    folder = tmp_path_factory.mktemp("plain")
    sources.exported(tiny, folder / "bundle", preset)
    return sources.opened(folder / "bundle")


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> Any:
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(str(tiny), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(ours: Pipeline, theirs: Any, **fields: Any) -> float:
    """PSNR of the repainted pixels."""
    common = {"num_inference_steps": sources.STEPS, "guidance_scale": 5.0, "output_type": "np", **fields}
    pictures = {"image": Image.fromarray(PICTURE), "mask_image": Image.fromarray(MASK)}
    size = {"height": 32, "width": 32}  # Diffusers takes the model's native size, we the picture's
    expected = theirs("red apple", generator=sources.generator(7), **common, **pictures, **size).images[0]
    found = ours("red apple", seed=7, **common, **pictures).images[0]
    white = MASK > 0
    return psnr_db(np.round(expected[white] * 255), np.round(found[white] * 255))


@pytest.mark.parametrize("device", sources.DEVICES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_plain_models_repaint_the_same(plain: dict[str, Pipeline], theirs: Any, device: str, strength: float) -> None:
    assert compare(plain[device], theirs, strength=strength) >= 50


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_with_other_samplers_too(
    plain: dict[str, Pipeline], theirs: Any, monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any]
) -> None:
    pipe = plain["onnxruntime:cpu"]
    scheduler = getattr(diffusers, name).from_config({**sources.NOISE, **change})
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    monkeypatch.setattr(pipe, "scheduler_config", {**scheduler.config, "_class_name": name})
    assert compare(pipe, theirs) >= 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inpaint")


@pytest.fixture(scope="module")
def made_for_it(folder: Path) -> Any:
    """Diffusers' pipeline with 9 channels."""
    scheduler = diffusers.DDIMScheduler(**sources.NOISE, clip_sample=False, set_alpha_to_one=False)
    kind = diffusers.StableDiffusionInpaintPipeline
    return sources.sd(folder / "source", kind, scheduler, unet_changes={"in_channels": 9})


@pytest.fixture(scope="module")
def made(folder: Path, made_for_it: Any, preset: Path) -> Any:
    return sources.exported(folder / "source", folder / "bundle", preset)


@pytest.fixture(scope="module")
def ours(folder: Path, made: Any) -> dict[str, Pipeline]:
    return sources.opened(folder / "bundle")


def test_nine_channels_equal_their_source(made: Any) -> None:
    assert min(item.sqnr_db for item in made.measured) >= 60
    assert made.manifest.components["unet"].inputs["sample"].shape[1] == 9
    assert made.manifest.tasks == ("inpaint",)
    assert made.manifest.golden_image.psnr_db >= 50


@pytest.mark.parametrize("device", sources.DEVICES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_nine_channels_repaint_the_same(
    ours: dict[str, Pipeline], made_for_it: Any, device: str, strength: float
) -> None:
    assert compare(ours[device], made_for_it, strength=strength) >= 50


@pytest.mark.parametrize("change", [{"guidance_scale": 1.0}, {"eta": 1.0}], ids=str)
def test_nine_channels_without_guidance_and_with_fresh_noise(
    ours: dict[str, Pipeline], made_for_it: Any, change: dict[str, Any]
) -> None:
    assert compare(ours["onnxruntime:cpu"], made_for_it, **change) >= 50


def test_verify_repeats_the_golden_image(ours: dict[str, Pipeline]) -> None:
    checks = list(verify(ours["onnxruntime:cpu"].bundle, "onnxruntime:cpu", SessionOptions()))
    assert [check.subject for check in checks if not check.passed] == []


def test_a_model_made_for_inpainting_can_do_nothing_else(ours: dict[str, Pipeline]) -> None:
    with pytest.raises(BundleUnsupported, match="can't do text-to-image; it was exported for inpaint"):
        ours["onnxruntime:cpu"]("cat", seed=0)


def test_a_pipeline_of_another_kind_is_refused(theirs: Any) -> None:
    with pytest.raises(ExportError, match="4 input channels can't be exported"):
        FAMILY.components(theirs)
