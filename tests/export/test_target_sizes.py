"""Graphs of one image size: fixed height and width, free batch and text length, and clear refusals of other sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.errors import InvalidRequest  # noqa: E402
from pocketdiffusion_export.component import ComponentSpec  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import Made, export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def bundles(tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, ...]:
    folder = tmp_path_factory.mktemp("sizes") / "static"
    plan = make_plan(tiny, folder, target="onnx,openvino", size="48x24", preset=preset)
    return export(plan, lambda line: None).bundles


def test_only_batch_and_length_are_free(bundles: tuple[Made, ...]) -> None:
    for made in bundles:
        parts = made.manifest.components
        assert parts["text_encoder"].inputs["input_ids"].shape == ("batch", "length")
        assert parts["unet"].inputs["sample"].shape == parts["unet"].outputs["out_sample"].shape
        assert parts["unet"].inputs["sample"].shape == ("batch", 4, 12, 24)
        assert parts["unet"].inputs["encoder_hidden_states"].shape == ("batch", "length", 32)
        assert parts["vae_decoder"].outputs["sample"].shape == ("batch", 3, 24, 48)
        assert parts["vae_encoder"].inputs["sample"].shape == ("batch", 3, 24, 48)
        assert (made.manifest.numbers.width, made.manifest.numbers.height) == (48, 24)


def test_the_source_is_met(bundles: tuple[Made, ...]) -> None:
    for made in bundles:
        assert min(item.sqnr_db for item in made.measured) >= 60
        assert made.manifest.golden_image is not None and made.manifest.golden_image.psnr_db >= 50


@pytest.mark.parametrize("index", [0, 1], ids=["onnx", "openvino"])
def test_the_runtime_takes_any_batch_and_prompt_and_no_other_size(bundles: tuple[Made, ...], index: int) -> None:
    pipe = Pipeline.from_pretrained(bundles[index].destination, device="cpu")
    long = "red apple " * 40
    images = pipe(long, num_inference_steps=2, num_images_per_prompt=3, seed=0).images
    assert [np.asarray(image).shape for image in images] == [(24, 48, 3)] * 3
    with pytest.raises(InvalidRequest, match="64x24 was asked; tiny is fixed to 48x24"):
        pipe("red apple", width=64)


@pytest.mark.parametrize("size", ["512", "0x64", "64x", "x", "-8x8", "64 x 64", "largest"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(ExportError, match="give WIDTHxHEIGHT in pixels, for example 512x512, or dynamic"):
        make_plan("source", "bundle", size=size)


@pytest.mark.parametrize("size", ["34x32", "32x30"])
def test_a_size_that_the_model_can_not_halve_is_refused(size: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"size {size} can't be exported; this model takes multiples of 4 pixels"):
        export(make_plan(tiny, tmp_path / "bundle", size=size), lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_samples_of_other_sizes_go_and_a_larger_batch_comes() -> None:
    spec = ComponentSpec(
        name="unet",
        module=torch.nn.Identity(),
        reference=lambda *inputs: inputs,
        inputs=("sample", "timestep"),
        outputs=("out",),
        axes={"sample": {0: "batch", 2: "height"}, "out": {0: "batch", 2: "height"}},
        example=(torch.zeros(2, 4, 64), torch.tensor(500.0)),
    )
    samples = [{"sample": np.zeros((1, 4, side), np.float32), "timestep": np.float32(1)} for side in (8, 8, 16)]
    fixed = spec.fixed(samples[0])
    assert fixed.axes == {"sample": {0: "batch"}, "out": {0: "batch"}}
    assert [tuple(tensor.shape) for tensor in fixed.example] == [(2, 4, 8), ()]
    assert float(fixed.example[1]) == 500
    assert [feeds["sample"].shape for feeds in fixed.fitting(samples)] == [(1, 4, 8), (1, 4, 8), (3, 4, 8)]
