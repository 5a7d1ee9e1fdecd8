"""Pictures changed by instructions (8-channel UNets), against Diffusers' InstructPix2Pix pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import SessionOptions  # noqa: E402
from pocketdiffusion.cli import main  # noqa: E402
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest  # noqa: E402
from pocketdiffusion.verify import verify  # noqa: E402

from . import family_sources as sources  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def make(folder: Path) -> Any:
    return sources.sd(folder, diffusers.StableDiffusionInstructPix2PixPipeline, unet_changes={"in_channels": 8})


def compare(ours: Pipeline, theirs: Any, **fields: Any) -> float:
    return sources.compare(ours, theirs, image=sources.PICTURE, **{"guidance_scale": 5.0, **fields})


def test_every_component_equals_its_source(made: Any) -> None:
    assert min(item.sqnr_db for item in made.measured) >= 60
    assert made.manifest.components["unet"].inputs["sample"].shape[1] == 8
    assert made.manifest.tasks == ("instruct",)
    assert made.manifest.golden_image.psnr_db >= 50


@pytest.mark.parametrize("device", sources.DEVICES)
@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_the_same_image(ours: dict[str, Pipeline], theirs: Any, device: str, scale: float) -> None:
    assert compare(ours[device], theirs, image_guidance_scale=scale) >= 50


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0},
        {"image_guidance_scale": 0.5},
        {"negative_prompt": "cat"},
        {"eta": 1.0},
        {"num_inference_steps": 3},
    ],
    ids=str,
)
def test_every_parameter_means_the_same(ours: dict[str, Pipeline], theirs: Any, fields: dict[str, Any]) -> None:
    assert compare(ours["onnxruntime:cpu"], theirs, **fields) >= 50


def test_with_another_sampler(ours: dict[str, Pipeline], theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that was published: euler ancestral."""
    pipe, scheduler = ours["onnxruntime:cpu"], diffusers.EulerAncestralDiscreteScheduler(**sources.NOISE)
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    monkeypatch.setattr(pipe, "scheduler_config", {**scheduler.config, "_class_name": type(scheduler).__name__})
    assert compare(pipe, theirs) >= 50


def test_guidance_takes_three_passes_in_one_batch_or_in_turn(ours: dict[str, Pipeline]) -> None:
    pipe = ours["onnxruntime:cpu"]
    common = {"seed": 0, "image": sources.PICTURE, "num_inference_steps": 3, "num_images_per_prompt": 2}
    one, other = (pipe("cat", batched_guidance=batched, output_type="np", **common) for batched in (True, False))
    assert [len(result.timings.samples["unet.run"]) for result in (one, other)] == [3, 9]
    np.testing.assert_allclose(one.images, other.images, atol=1e-4)
    assert one.parameters[0].extra["Image CFG scale"] == "1.5" and "Denoising strength" not in one.parameters[0].extra
    assert one.digital_source == "compositeWithTrainedAlgorithmicMedia"


def test_verify_repeats_the_golden_image(ours: dict[str, Pipeline]) -> None:
    checks = list(verify(ours["onnxruntime:cpu"].bundle, "onnxruntime:cpu", SessionOptions()))
    assert [check.subject for check in checks if not check.passed] == []


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, BundleUnsupported, r"can't do text-to-image; it was exported for instruct \(give image\)"),
        ({"image": sources.PICTURE, "strength": 0.5}, InvalidRequest, "strength was given; a model that follows"),
        ({"image": sources.PICTURE, "mask_image": sources.MASK}, InvalidRequest, "mask_image was given; a model that"),
        ({"image_guidance_scale": 1.5}, InvalidRequest, "image_guidance_scale was given without image"),
    ],
)
def test_what_does_not_fit_is_one_line(
    ours: dict[str, Pipeline], fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ours["onnxruntime:cpu"]("cat", seed=0, **fields)


def test_other_models_take_no_image_guidance(tiny: Path, preset: Path, tmp_path: Path) -> None:
    sources.exported(tiny, tmp_path / "bundle", preset)
    pipe = Pipeline.from_pretrained(tmp_path / "bundle", device="onnxruntime:cpu")
    with pytest.raises(BundleUnsupported, match="can't do instruct; it was exported for text-to-image, "):
        pipe("cat", seed=0, image=sources.PICTURE, image_guidance_scale=1.5)


def test_on_the_command_line(twins: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources.PICTURE.save(tmp_path / "in.png")
    words = ["generate", "a cat", "--model", str(twins.folder / "bundle"), "--steps", "2", "--seed", "0", "--json"]
    words += ["--output", str(tmp_path / "out.png"), "--device", "onnxruntime:cpu", "--image-guidance", "2"]
    assert main([*words, "--image", str(tmp_path / "in.png")]) == 0
    (parameters,) = json.loads(capsys.readouterr().out)["parameters"]
    assert parameters["extra"]["Image CFG scale"] == "2" and (tmp_path / "out.png").is_file()
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
