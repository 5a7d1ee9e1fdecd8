"""Inpainting with plain UNets and with those made for it, against Diffusers' inpainting pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import SessionOptions  # noqa: E402
from pocketdiffusion.errors import BundleUnsupported  # noqa: E402
from pocketdiffusion.verify import verify  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.families.sd import FAMILY  # noqa: E402

from . import family_sources as sources  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def make(folder: Path) -> Any:
    kind = diffusers.StableDiffusionInpaintPipeline
    return sources.sd(folder, kind, unet_changes={"in_channels": 9})


@pytest.fixture(scope="module")
def plain(tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """The 4-channel model."""
    folder = tmp_path_factory.mktemp("plain")
    sources.exported(tiny, folder / "bundle", preset)
    return sources.opened(folder / "bundle")


@pytest.fixture(scope="module")
def plain_theirs(tiny: Path) -> Any:
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(str(tiny), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(ours: Pipeline, theirs: Any, **fields: Any) -> float:
    given = {"image": sources.PICTURE, "mask_image": sources.MASK, "guidance_scale": 5.0, **fields}
    return sources.compare(ours, theirs, only_theirs=sources.SIZE, **given)


@pytest.mark.parametrize("device", sources.DEVICES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_plain_models_repaint_the_same(
    plain: dict[str, Pipeline], plain_theirs: Any, device: str, strength: float
) -> None:
    assert compare(plain[device], plain_theirs, strength=strength) >= 50


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_with_other_samplers_too(
    plain: dict[str, Pipeline], plain_theirs: Any, monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any]
) -> None:
    pipe = plain["onnxruntime:cpu"]
    scheduler = getattr(diffusers, name).from_config({**sources.NOISE, **change})
    monkeypatch.setattr(plain_theirs, "scheduler", scheduler)
    monkeypatch.setattr(pipe, "scheduler_config", {**scheduler.config, "_class_name": name})
    assert compare(pipe, plain_theirs) >= 50


def test_nine_channels_equal_their_source(made: Any) -> None:
    assert min(item.sqnr_db for item in made.measured) >= 60
    assert made.manifest.components["unet"].inputs["sample"].shape[1] == 9
    assert made.manifest.tasks == ("inpaint",)
    assert made.manifest.golden_image.psnr_db >= 50


@pytest.mark.parametrize("device", sources.DEVICES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_nine_channels_repaint_the_same(ours: dict[str, Pipeline], theirs: Any, device: str, strength: float) -> None:
    assert compare(ours[device], theirs, strength=strength) >= 50


@pytest.mark.parametrize("change", [{"guidance_scale": 1.0}, {"eta": 1.0}], ids=str)
def test_nine_channels_without_guidance_and_with_fresh_noise(
    ours: dict[str, Pipeline], theirs: Any, change: dict[str, Any]
) -> None:
    assert compare(ours["onnxruntime:cpu"], theirs, **change) >= 50


def test_verify_repeats_the_golden_image(ours: dict[str, Pipeline]) -> None:
    checks = list(verify(ours["onnxruntime:cpu"].bundle, "onnxruntime:cpu", SessionOptions()))
    assert [check.subject for check in checks if not check.passed] == []


def test_a_model_made_for_inpainting_can_do_nothing_else(ours: dict[str, Pipeline]) -> None:
    with pytest.raises(BundleUnsupported, match="can't do text-to-image; it was exported for inpaint"):
        ours["onnxruntime:cpu"]("cat", seed=0)


def test_a_pipeline_of_another_kind_is_refused(plain_theirs: Any) -> None:
    with pytest.raises(ExportError, match="4 input channels can't be exported"):
        FAMILY.components(plain_theirs)
