"""Graphs of fixed image sizes, one or several that share weights, of free and of fixed batch; refusals of others."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import SessionOptions  # noqa: E402
from pocketdiffusion.bundle import Bundle  # noqa: E402
from pocketdiffusion.errors import InvalidRequest  # noqa: E402
from pocketdiffusion.verify import psnr_db, verify  # noqa: E402
from pocketdiffusion_export.component import ComponentSpec  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import Made, export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.sizes import fixed_shapes, graph_plans  # noqa: E402
from pocketdiffusion_export.targets.openvino import share_weights  # noqa: E402

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


@pytest.fixture(scope="module", params=["fp32", "int8"])
def several(
    request: pytest.FixtureRequest, tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Made, ...]:
    folder = tmp_path_factory.mktemp("sizes") / "several"
    plan = make_plan(
        tiny, folder, target="onnx,openvino", size="32x32, 48x24,32x32", recipe=request.param, preset=preset
    )
    return export(plan, lambda line: None).bundles


def test_several_sizes_share_their_weights(several: tuple[Made, ...]) -> None:
    onnx, ir = several
    names = ("unet", "vae_decoder", "vae_encoder")
    for made, stem, weights in (
        (onnx, "model{}.onnx", "model.onnx_data"),
        (ir, "openvino_model{}.xml", "openvino_model.bin"),
    ):
        for name in names:
            found = {file.name for file in (made.destination / name).iterdir()}
            assert found == {stem.format(""), stem.format("_48x24"), weights, "config.json"}
        assert Bundle.open(made.destination).manifest == made.manifest
        assert made.manifest.format_version == 2
        assert not made.manifest.components["text_encoder"].sizes
    assert not (onnx.destination / "text_encoder/model.onnx_data").exists()
    shared = onnx.destination / "unet"
    assert (shared / "model.onnx").stat().st_size < (shared / "model.onnx_data").stat().st_size


def test_each_size_is_the_sources(several: tuple[Made, ...]) -> None:
    onnx, ir = several
    least = 60 if onnx.manifest.recipe == "fp32" else 25
    for made, engines in ((onnx, 2), (ir, 1)):
        for name in ("unet", "vae_decoder", "vae_encoder"):
            found = [item for item in made.measured if item.component == f"{name} 48x24"]
            assert len(found) == engines
            assert min(item.sqnr_db for item in found) >= least
        unet = made.manifest.components["unet"]
        (wide,) = unet.sizes
        assert (wide.width, wide.height) == (48, 24)
        assert (unet.inputs["sample"].shape, wide.inputs["sample"].shape) == (
            ("batch", 4, 16, 16),
            ("batch", 4, 12, 24),
        )
        assert wide.outputs["out_sample"].shape == ("batch", 4, 12, 24)
        assert made.manifest.components["vae_decoder"].sizes[0].outputs["sample"].shape == ("batch", 3, 24, 48)


@pytest.mark.parametrize("index", [0, 1], ids=["onnx", "openvino"])
def test_the_runtime_makes_each_size_as_one_alone_does(
    several: tuple[Made, ...], bundles: tuple[Made, ...], index: int
) -> None:
    pipe = Pipeline.from_pretrained(several[index].destination, device="cpu")
    assert np.asarray(pipe("red apple", num_inference_steps=2, seed=0).images[0]).shape == (32, 32, 3)
    wide = pipe("red apple", num_inference_steps=2, seed=0, width=48, height=24, num_images_per_prompt=2).images
    alone = Pipeline.from_pretrained(bundles[index].destination, device="cpu")
    want = alone("red apple", num_inference_steps=2, seed=0, num_images_per_prompt=2).images
    least = 50 if several[index].manifest.recipe == "fp32" else 20
    assert min(psnr_db(np.asarray(a), np.asarray(b)) for a, b in zip(want, wide, strict=True)) >= least
    with pytest.raises(InvalidRequest, match="64x32 was asked; tiny is fixed to 32x32, 48x24"):
        pipe("red apple", width=64)


def test_ir_of_other_weights_is_not_shared(tmp_path: Path) -> None:
    first, other = tmp_path / "openvino_model.xml", tmp_path / "openvino_model_8x8.xml"
    for file, data in ((first, b"one"), (other, b"two")):
        file.with_suffix(".bin").write_bytes(data)
    with pytest.raises(ExportError, match="openvino_model_8x8.xml has other weights than openvino_model.xml"):
        share_weights(first, other)


@pytest.mark.parametrize("batch", [1, 2])
def test_no_axis_is_free_in_graphs_of_a_fixed_batch(batch: int, tiny: Path, preset: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny, tmp_path / "b", target="onnx,openvino", size="32x32,48x24", batch=batch, preset=preset)
    for made in export(plan, lambda line: None).bundles:
        for name, entry in made.manifest.components.items():
            rows = batch if name == "unet" else 1
            for graph in entry.graphs:
                specs = [*graph.inputs.values(), *graph.outputs.values()]
                assert all(isinstance(axis, int) for spec in specs for axis in spec.shape)
                assert {spec.shape[0] for spec in specs if len(spec.shape) > 1} == {rows}
        assert min(item.sqnr_db for item in made.measured) >= 60
        assert made.manifest.golden_image is not None and made.manifest.golden_image.psnr_db >= 50
        assert all(check.passed for check in verify(Bundle.open(made.destination), "cpu", SessionOptions()))
        pipe = Pipeline.from_pretrained(made.destination, device="cpu")
        images = pipe("red apple", num_inference_steps=2, num_images_per_prompt=3, seed=0, width=48, height=24).images
        assert [np.asarray(image).shape for image in images] == [(24, 48, 3)] * 3
        with pytest.raises(InvalidRequest, match="fixed to 16: shorten it"):
            pipe("red apple " * 40)


@pytest.mark.parametrize(
    ("size", "batch", "reason"),
    [("32x32", 3, "batch 3 can't be fixed; choose 1 .* or 2"), ("dynamic", 1, "batch 1 needs fixed sizes as well")],
)
def test_a_batch_that_can_not_be_fixed_is_refused(size: str, batch: int, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        make_plan("source", "bundle", size=size, batch=batch)


def test_a_disk_that_is_too_small_is_found_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 1000))
    lines: list[str] = []
    with pytest.raises(ExportError, match=r"the export needs 0\.0 GB or more, 0\.0 GB are free at .*; free space"):
        export(make_plan(tiny, tmp_path / "bundle"), lines.append)
    assert len(lines) == 1 and lines[0].startswith("loading")
    assert list(tmp_path.iterdir()) == []


UNET = ComponentSpec(
    name="unet",
    module=torch.nn.Identity(),
    reference=lambda *inputs: inputs,
    inputs=("sample", "timestep"),
    outputs=("out",),
    axes={"sample": {0: "batch", 2: "height"}, "out": {0: "batch", 2: "height"}},
    example=(torch.zeros(2, 4, 64), torch.tensor(500.0)),
)
SAMPLES = [
    {"sample": np.arange(2 * 4 * side, dtype=np.float32).reshape(2, 4, side), "timestep": np.float32(1)}
    for side in (8, 8, 16)
]


def test_samples_of_other_sizes_go_and_a_larger_batch_comes() -> None:
    assert [plan.samples for plan in graph_plans(UNET, SAMPLES, (), None)] == [SAMPLES]
    (first,) = graph_plans(UNET, SAMPLES, [(64, 64)], None)
    assert [feeds["sample"].shape for feeds in first.samples] == [(2, 4, 8), (2, 4, 8), (3, 4, 8)]


def test_other_sizes_get_a_sample_of_their_own() -> None:
    first, small, tall = graph_plans(UNET, SAMPLES, [(64, 64), (64, 32), (32, 96)], None)
    assert (first.size, small.size, tall.size) == (None, (64, 32), (32, 96))
    assert [feeds["sample"].shape for feeds in (*small.samples, *tall.samples)] == [(2, 4, 4), (2, 4, 12)]
    np.testing.assert_array_equal(tall.samples[0]["sample"][..., 8:], SAMPLES[0]["sample"][..., :4])


def test_samples_of_a_fixed_batch_take_all_rows_in_turn() -> None:
    (first,) = graph_plans(UNET, SAMPLES, [(64, 64)], 1)
    rows = [feeds["sample"] for feeds in first.samples]
    np.testing.assert_array_equal(np.concatenate(rows), SAMPLES[0]["sample"])


def test_what_stays_free() -> None:
    tensors = SAMPLES[0] | {"out": SAMPLES[0]["sample"]}
    assert fixed_shapes(UNET, tensors, batch=False) == {
        "sample": ("batch", 4, 8),
        "timestep": (),
        "out": ("batch", 4, 8),
    }
    assert fixed_shapes(UNET, tensors, batch=True)["out"] == (2, 4, 8)
