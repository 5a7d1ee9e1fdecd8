"""The weight-only quantizer on arrays and on one-node graphs."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from pocketdiffusion_export.quant import RECIPES, Recipe  # noqa: E402
from pocketdiffusion_export.quant.weight_only import quantize, quantize_array  # noqa: E402

pytestmark = pytest.mark.torch

RECIPE = Recipe("test", "int8", 25, 25, method="weight_only", min_elements=16, min_weight_sqnr_db=20)


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("shape", "axis"), [((8, 4, 3, 3), 0), ((64, 12), 1), ((50, 16), 0)])
def test_error_is_never_larger_than_with_the_largest_value_as_scale(shape: tuple[int, ...], axis: int) -> None:
    w = weight(*shape)
    codes, scale = quantize_array(w, axis)
    assert codes.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (shape[axis],)
    assert codes.min() >= -127
    along = [-1 if index == axis else 1 for index in range(w.ndim)]
    others = tuple(index for index in range(w.ndim) if index != axis)
    naive = np.abs(w).max(others, keepdims=True) / 127
    error = np.square(w - codes * scale.reshape(along)).sum(others)
    naive_error = np.square(w - np.rint(w / naive) * naive).sum(others)
    assert (error <= naive_error * (1 + 1e-5)).all()


def test_an_outlier_is_clipped_only_when_that_pays() -> None:
    w = weight(2, 4096)
    w[0, 0] = 8.0
    _, scale = quantize_array(w, 0)
    assert scale[0] < 8 / 127
    w[0, 0] = 100.0
    _, scale = quantize_array(w, 0)
    assert scale[0] == pytest.approx(100 / 127, rel=0.02)


def test_a_channel_of_zeros_stays_zero() -> None:
    w = weight(3, 32)
    w[1] = 0
    codes, scale = quantize_array(w, 0)
    assert (codes[1] == 0).all() and np.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize(
    ("op", "shape", "axis", "attributes"),
    [
        ("Conv", (8, 4, 3, 3), 0, {"pads": [1, 1, 1, 1]}),
        ("MatMul", (16, 12), 1, {}),
        ("Gemm", (16, 12), 1, {}),
        ("Gemm", (12, 16), 0, {"transB": 1}),
        ("Gather", (40, 8), 0, {"axis": 0}),
    ],
)
def test_each_kind_of_weight(op: str, shape: tuple[int, ...], axis: int, attributes: dict[str, object]) -> None:
    w = weight(*shape)
    x = {"Conv": weight(1, 4, 8, 8), "Gather": np.array([3, 0, 39])}.get(op, weight(5, 16))
    inputs = ["w", "x"] if op == "Gather" else ["x", "w"]
    model = one_node(op, inputs, x, w, attributes)
    before = evaluate(model, x)
    report = quantize(model, RECIPE)
    onnx.checker.check_model(model)
    (node,) = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert node.attribute[0].i == axis
    assert report.quantized.keys() == {"w"} and report.quantized["w"] > 38
    after = evaluate(model, x)
    assert 35 < 10 * np.log10(np.square(before).sum() / np.square(before - after).sum()) < 60


def test_small_and_badly_hit_weights_stay_float() -> None:
    model = one_node("MatMul", ["x", "w"], weight(1, 2), weight(2, 4), {})
    report = quantize(model, RECIPE)
    assert report.kept_float == {"w": "8 elements, fewer than 16"} and not report.quantized
    w = weight(32, 4)
    w[0] = 1e4  # one row dwarfs the rest: after it, the small ones are lost, but the tensor's own SQNR is high
    strict = Recipe("test", "int8", 25, 25, min_elements=16, min_weight_sqnr_db=99)
    model = one_node("MatMul", ["x", "w"], weight(1, 32), w, {})
    assert "less than 99" in quantize(model, strict).kept_float["w"]
    assert [node.op_type for node in model.graph.node] == ["MatMul"]


def test_a_shared_weight_is_stored_once_and_a_doubly_used_one_stays_float() -> None:
    w = weight(16, 16)
    model = one_node("MatMul", ["x", "w"], weight(4, 16), w, {})
    model.graph.node[0].output[0] = "h"
    model.graph.node.append(onnx.helper.make_node("MatMul", ["h", "w"], ["y"]))
    quantize(model, RECIPE)
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "MatMul", "MatMul"]
    model = one_node("MatMul", ["x", "w"], weight(16, 16), w, {})
    model.graph.node[0].output[0] = "h"
    model.graph.node.append(onnx.helper.make_node("Add", ["h", "w"], ["y"]))
    assert not quantize(model, RECIPE).quantized


def test_the_recipes_are_what_the_cards_say() -> None:
    assert (RECIPES["fp32"].min_sqnr_db, RECIPES["fp32"].min_psnr_db) == (60, 50)
    assert RECIPES["int8"].min_sqnr_db == 25


def one_node(
    op: str, inputs: list[str], x: np.ndarray, w: np.ndarray, attributes: dict[str, object]
) -> onnx.ModelProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, inputs, ["y"], **attributes)],
        "test",
        [onnx.helper.make_tensor_value_info("x", kind, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * w.ndim)],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def evaluate(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # float arithmetic after dequantization
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
