"""Large weights lie beside the graph: mapped by engines, equal to the bit, held in memory once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")

from pocketdiffusion.pipeline import Pipeline  # noqa: E402
from pocketdiffusion_export import verify  # noqa: E402
from pocketdiffusion_export.component import Call, ComponentSpec  # noqa: E402
from pocketdiffusion_export.export import export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.quant import RECIPES  # noqa: E402
from pocketdiffusion_export.quant.weight_only import quantize  # noqa: E402
from pocketdiffusion_export.targets import onnx as target  # noqa: E402
from pocketdiffusion_export.targets.onnx_clean import clean  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def spec() -> ComponentSpec:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [torch.nn.Linear(48, 64), torch.nn.SiLU(), torch.nn.Linear(64, 48), torch.nn.LayerNorm(48)]
    model = torch.nn.Sequential(*layers).eval()
    return ComponentSpec(
        name="unet",
        module=Call(model, model),
        reference=lambda x: (model(x),),
        inputs=("x",),
        outputs=("y",),
        axes={"x": {0: "batch"}, "y": {0: "batch"}},
        example=(torch.zeros(2, 48),),
    )


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "EXTERNAL_BYTES", 1000)


def test_small_models_are_one_file(spec: ComponentSpec, tmp_path: Path) -> None:
    target.TARGET.save(target.TARGET.trace(spec), tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_both_engines_read_what_lies_beside(recipe: str, spec: ComponentSpec, external: None, tmp_path: Path) -> None:
    model = target.TARGET.trace(spec)
    if recipe == "int8":
        quantize(model, RECIPES["int8"])
    before = model.SerializeToString()
    file = tmp_path / "model.onnx"
    target.TARGET.save(model, file)
    assert model.SerializeToString() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    stored = onnx.load(file, load_external_data=False)
    outside = [tensor for tensor in stored.graph.initializer if tensor.external_data]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in outside]
    assert len(outside) >= 2 and all(int(place["offset"]) % target.PAGE == 0 for place in places)
    x = np.random.default_rng(0).standard_normal((3, 48)).astype(np.float32)
    expected = spec.run_reference({"x": x})
    for engine in ("onnxruntime", "openvino"):
        session = verify.open_session(file, engine)
        figures = verify.compare([expected["y"]], [session.run({"x": x})["y"]])
        session.close()
        assert figures.sqnr_db > (100 if recipe == "fp32" else 35)


def test_the_same_model_gives_the_same_bytes(spec: ComponentSpec, external: None, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        target.TARGET.save(target.TARGET.trace(spec), tmp_path / name / "model.onnx")
        contents.append([file.read_bytes() for file in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]


def test_the_source_lets_its_weights_go_only_when_asked(spec: ComponentSpec) -> None:
    weights = dict(spec.module.named_parameters())
    kept = target.TARGET.trace(spec)
    assert all(tensor.numel() for tensor in weights.values())
    released = target.TARGET.trace(spec, release=True)
    assert not any(tensor.numel() for tensor in weights.values())
    assert kept.SerializeToString() == released.SerializeToString()


def test_constants_that_only_differ_in_the_sign_of_zero_stay_apart() -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "a"], ["h"]), onnx.helper.make_node("Div", ["h", "b"], ["y"])],
        "test",
        [value(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "a", "b")],
        [value("y", onnx.TensorProto.FLOAT, [2])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    weights = {"a": np.zeros(2, np.float32), "b": -np.zeros(2, np.float32)}
    cleaned = clean(model, weights)
    assert [tensor.name for tensor in cleaned.graph.initializer] == ["a", "b"] and not weights
    assert [value.name for value in cleaned.graph.input] == ["x"]


def test_a_bundle_lists_and_runs_them(
    tiny: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "EXTERNAL_BYTES", 10_000)
    made = export(make_plan(tiny, tmp_path / "bundle", preset=preset), lambda line: None).bundles[0]
    listed = {entry.path for entry in made.manifest.files}
    assert {f"{name}/model.onnx_data" for name in made.manifest.components} <= listed
    assert made.manifest.golden_image is not None and made.manifest.golden_image.psnr_db > 50
    pixels = []
    for device in ("onnxruntime:cpu", "openvino:cpu"):
        pipe = Pipeline.from_pretrained(tmp_path / "bundle", device=device)
        pixels.append(np.asarray(pipe("cat", seed=0, num_inference_steps=2).images[0]))
    assert verify.image_psnr(pixels[0], pixels[1]) > 50
