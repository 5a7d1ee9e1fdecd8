"""float16 and int4 storage on one-node graphs, on both engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from pocketdiffusion import backends  # noqa: E402
from pocketdiffusion.backends.base import SessionOptions  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.quant import RECIPES, Recipe, half, int4  # noqa: E402

pytestmark = pytest.mark.torch

RECIPE = Recipe("test", "int4", 20, 15, min_elements=16, group=32, min_int4_sqnr_db=10)
ENGINES = [name for name in ("onnxruntime", "openvino") if "cpu" in backends.load(name).devices()]


def graph(op: str, w: np.ndarray, columns: int, **attributes: object) -> onnx.ModelProto:
    """y = op(x, w) with a free first axis."""
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        [onnx.helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "test",
        [value("x", onnx.TensorProto.FLOAT, ["rows", columns])],
        [value("y", onnx.TensorProto.FLOAT, ["rows", None])],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, engine: str, folder: Path, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model)
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return backends.load(engine).open(file, "cpu", SessionOptions()).run({"x": x})["y"]


@pytest.mark.parametrize("engine", ENGINES)
def test_float16_storage_computes_in_float32_with_the_rounded_weights(engine: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 48), (5, 64)))
    model = graph("MatMul", w, 64)
    before = model.ByteSize()
    report = half.quantize(model, RECIPE)
    assert 70 < report.quantized["w"] < 90 and model.ByteSize() < 0.6 * before
    np.testing.assert_allclose(run(model, engine, tmp_path, x), x @ w.astype(np.float16).astype(np.float32), atol=1e-4)


def test_values_beyond_float16_and_small_tensors_stay_float32() -> None:
    huge = np.full((8, 8), 7e4, np.float32)
    for w, reason in ((huge, "holds values beyond float16"), (huge[:2, :4], "8 elements, fewer than 16")):
        model = graph("MatMul", w, len(w))
        assert half.quantize(model, RECIPE).kept_float == {"w": reason}
        assert [node.op_type for node in model.graph.node] == ["MatMul"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [("MatMul", (64, 24), {}), ("Gemm", (64, 24), {}), ("Gemm", (24, 64), {"transB": 1})],
)
def test_int4_groups_run_along_the_inputs(
    engine: str, op: str, shape: tuple[int, int], attributes: dict[str, int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    w, x = (rng.standard_normal(size).astype(np.float32) for size in (shape, (3, 64)))
    inputs = 1 if attributes else 0
    model = graph(op, w, 64, **attributes)
    report = int4.quantize(model, RECIPE)
    codes, scale = int4.quantize_blocks(w, inputs, RECIPE.group)
    assert np.abs(codes).max() == 7 and scale.shape[inputs] == 2 and report.quantized["w"] > 15
    back = codes * scale.repeat(32, inputs)
    np.testing.assert_allclose(run(model, engine, tmp_path, x), x @ (back.T if attributes else back), atol=1e-4)


def test_int4_falls_back_to_int8_where_groups_do_not_fit_or_the_error_is_too_large() -> None:
    w = np.random.default_rng(2).standard_normal((48, 24)).astype(np.float32)
    strict = Recipe("test", "int4", 20, 15, min_elements=16, group=16, min_int4_sqnr_db=99)
    for recipe in (RECIPE, strict):
        model = graph("MatMul", w, 48)
        assert int4.quantize(model, recipe).quantized["w"] > 38
        assert {tensor.data_type for tensor in model.graph.initializer} == {
            onnx.TensorProto.INT8,
            onnx.TensorProto.FLOAT,
        }


def test_int4_refuses_a_graph_that_its_opset_does_not_know() -> None:
    model = graph("MatMul", np.ones((32, 8), np.float32), 32)
    model.graph.node.append(onnx.helper.make_node("ReduceMean", ["y"], ["z"], axes=[0]))  # an input since opset 18
    with pytest.raises(ExportError, match="opset 21"):
        int4.quantize(model, RECIPE)


def test_every_recipe_says_what_it_demands() -> None:
    assert set(RECIPES) >= {"fp32", "fp16", "int8", "int4", "w8a8"}
    assert all(recipe.min_sqnr_db >= 20 for recipe in RECIPES.values() if recipe.method != "palette")
