"""Bundles with graphs in parts: made with an export or from a bundle, of both formats; what they compute."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

import onnx  # noqa: E402

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import SessionOptions  # noqa: E402
from pocketdiffusion.bundle import Bundle  # noqa: E402
from pocketdiffusion.bundle.manifest_json import MANIFEST  # noqa: E402
from pocketdiffusion.cli import main  # noqa: E402
from pocketdiffusion.errors import BundleCorrupt  # noqa: E402
from pocketdiffusion.verify import verify  # noqa: E402
from pocketdiffusion_export import parts  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import Made, export  # noqa: E402
from pocketdiffusion_export.parts import cut_bundle  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402

pytestmark = pytest.mark.torch

LIMIT = 400_000
"""Bytes; the tiny denoiser has several times as many."""
WEIGHTS = ("unet/model.onnx_data", "unet/openvino_model.bin")


def quiet(line: str) -> None:
    pass


def plan(source: Path, destination: Path, preset: Path, **options: Any) -> Any:
    return replace(make_plan(source, destination, preset=preset, **options), part_bytes=LIMIT)


@pytest.fixture(scope="module", params=["w8a8", pytest.param("fp32", marks=pytest.mark.slow)])
def made(
    request: pytest.FixtureRequest, tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Made, ...]:
    """ONNX and IR of one recipe, of any size."""
    folder = tmp_path_factory.mktemp("parts") / request.param
    asked = plan(tiny, folder, preset, target="onnx,openvino", recipe=request.param, accept_error=True)
    return export(asked, quiet).bundles


def pictures(bundle: Path, device: str, residency: Any, **options: Any) -> Any:
    pipe = Pipeline.from_pretrained(bundle, device=device, residency=residency, weights="compact")
    found = pipe("red apple", num_inference_steps=2, seed=0, guidance_scale=3, output_type="np", **options).images
    pipe.close()
    return found


def test_the_parts_make_the_picture_of_the_whole(made: tuple[Made, ...]) -> None:
    onnx_bundle, ir_bundle = (bundle.destination for bundle in made)
    for bundle, device in ((onnx_bundle, "onnxruntime"), (onnx_bundle, "openvino"), (ir_bundle, "openvino")):
        for options in ({}, {"width": 48, "batched_guidance": False}):
            error = pictures(bundle, device, "stream", **options) - pictures(bundle, device, "release", **options)
            rounds_elsewhere = made[0].manifest.recipe == "w8a8" and device == "openvino"
            assert np.sqrt(np.square(error).mean()) < (0.05 if rounds_elsewhere else 1e-4)


def test_parts_are_small_and_read_the_weights_of_the_whole(made: tuple[Made, ...]) -> None:
    for bundle in made:
        entry = bundle.manifest.components["unet"]
        assert len(entry.parts) > 2 and bundle.manifest.format_version == 3
        sizes = {file.path: file.size for file in bundle.manifest.files}
        weights = next(size for path, size in sizes.items() if path in WEIGHTS)
        assert max(part.weight_bytes for part in entry.parts) <= LIMIT < weights
        assert sum(path.startswith("unet/") and size > LIMIT for path, size in sizes.items()) <= 2
        assert any(note.startswith(f"{entry.graph} once more in {len(entry.parts)} parts") for note in bundle.notes)
        assert f"in {len(entry.parts)} parts" in (bundle.destination / "README.md").read_text(encoding="utf-8")


def test_integer_layers_stay_whole(made: tuple[Made, ...]) -> None:
    """No part is handed, or hands on, what stands between a layer and the rounding of its output."""
    bundle = made[0]
    for part in bundle.manifest.components["unet"].parts:
        graph = onnx.load(bundle.destination / part.graph, load_external_data=False).graph
        given, handed_on = {value.name for value in graph.input}, {value.name for value in graph.output}
        makers = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] in makers:
                assert makers[node.input[0]].op_type != "Conv" or node.input[0] not in handed_on
            if node.op_type == "DequantizeLinear":
                assert node.input[0] not in given
        assert {spec.dtype for spec in (*part.inputs.values(), *part.outputs.values())} == {"float32"}


def test_a_bundle_with_parts_verifies(made: tuple[Made, ...]) -> None:
    for bundle in made:
        assert all(check.passed for check in verify(Bundle.open(bundle.destination), "cpu", SessionOptions()))


def test_a_damaged_part_is_refused(made: tuple[Made, ...], tmp_path: Path) -> None:
    for bundle in made:
        copy = shutil.copytree(bundle.destination, tmp_path / bundle.destination.name)
        file = copy / bundle.manifest.components["unet"].parts[1].graph
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(BundleCorrupt, match=file.name):
            Bundle.open(copy)


@pytest.mark.slow
def test_graphs_of_several_fixed_sizes_have_parts_each(tiny: Path, preset: Path, tmp_path: Path) -> None:
    asked = plan(tiny, tmp_path / "sizes", preset, target="onnx,openvino", size="32x32,48x24", batch=1)
    for bundle in export(asked, quiet).bundles:
        native, wide = bundle.manifest.components["unet"].graphs
        for graph, shape in ((native, (1, 4, 16, 16)), (wide, (1, 4, 12, 24))):
            assert graph.parts[0].inputs["sample"].shape == shape
            # rows are not always found: they come from arithmetic on shapes
            lengths = [axis for part in graph.parts for spec in part.outputs.values() for axis in spec.shape[1:]]
            assert all(isinstance(length, int) for length in lengths)
        for size in ((32, 32), (48, 24)):
            options = {"width": size[0], "height": size[1], "batched_guidance": False}
            whole = pictures(bundle.destination, "cpu", "release", **options)
            np.testing.assert_allclose(pictures(bundle.destination, "cpu", "stream", **options), whole, atol=2e-3)


@pytest.mark.slow
def test_a_bundle_is_cut_and_cut_again(tiny: Path, preset: Path, tmp_path: Path, capsys: Any) -> None:
    source = export(make_plan(tiny, tmp_path / "whole", preset=preset), quiet).bundles[0].destination
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    assert main(["export", str(source), str(tmp_path / "uncut"), "--part-size", "64"]) == 0
    assert not Bundle.open(tmp_path / "uncut").manifest.components["unet"].parts  # all of it is less than that
    assert capsys.readouterr().out == f"{tmp_path / 'uncut'}\n"
    few = cut_bundle(source, tmp_path / "cut", 2, quiet)
    many = cut_bundle(tmp_path / "cut", tmp_path / "again", 1, quiet)
    assert few != many and "dB SQNR on onnxruntime" in many[0] and "dB SQNR on openvino" in many[0]
    manifest = Bundle.open(tmp_path / "again").manifest
    listed = {part.graph for entry in manifest.components.values() for part in entry.parts}
    assert {file.path for file in manifest.files if "_part" in file.path} == listed
    np.testing.assert_array_equal(
        pictures(tmp_path / "again", "cpu", "stream"), pictures(tmp_path / "cut", "cpu", "stream")
    )
    assert before == {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}


def test_parts_that_differ_end_the_export(
    tiny: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_sqnr", lambda *_: 20.0)
    with pytest.raises(ExportError, match="parts of unet/model.onnx differ from the whole: 20 dB SQNR on onnxruntime"):
        export(plan(tiny, tmp_path / "bundle", preset), quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--part-size", "0"], "part size 0 is none; give megabytes of weights, for example 64"),
        (["--part-size", "4", "--target", "coreml"], "coreml graphs can't be cut into parts; .* onnx, openvino"),
    ],
)
def test_what_can_not_be_cut_is_said_at_once(options: list[str], reason: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", "random:tiny-sd", str(tmp_path / "x"), *options]) == 1
    assert re.search(reason, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "is a bundle, which can be cut into parts or get a tiny decoder and no more; give --part-size MB or"),
        (["--part-size", "4", "--recipe", "int8"], "tiny decoder and no more, and --part-size, --recipe was given"),
        (["--part-size", "4", "--banded-vae"], "no more, and --part-size, --banded-vae was given"),
        (["--part-size", "4", "--tiny-vae", "x"], "no more, and --part-size, --tiny-vae was given"),
        (["--tiny-vae", "x", "--size", "64x64"], "no more, and --tiny-vae, --size was given"),
    ],
)
def test_a_bundle_as_source_takes_a_part_size_alone(
    options: list[str], reason: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_text("{}", encoding="utf-8")
    assert main(["export", str(tmp_path / "bundle"), str(tmp_path / "x"), *options]) == 1
    assert reason in capsys.readouterr().err


def test_a_bundle_is_not_cut_onto_itself(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is the bundle that is changed; choose another folder"):
        cut_bundle(tmp_path, tmp_path, 4, quiet)
