"""Palettes: k-means in one dimension, and weights of ONNX graphs as palettes and indices."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.quant import RECIPES, Recipe  # noqa: E402
from pocketdiffusion_export.quant.palette import find_palette, quantize  # noqa: E402
from pocketdiffusion_export.quant.weights import sqnr_db  # noqa: E402

pytestmark = pytest.mark.torch

RECIPE = Recipe("test", "palette4", 10, 10, method="palette", min_elements=64, min_weight_sqnr_db=15, palette=4)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("bits", "best"), [(1, 4.40), (2, 9.30), (4, 20.22), (6, 31.89), (8, 43.8)])
def test_a_normal_weight_comes_back_as_well_as_theory_allows(bits: int, best: float) -> None:
    """The best quantizers of a normal distribution: Max, "Quantizing for minimum distortion", 1960; 8 bits by
    Panter and Dite's formula, 6.02 bits - 4.35 dB."""
    weight = normal(300_000)
    palette, indices = find_palette(weight, bits)
    assert abs(sqnr_db(weight, palette[indices]) - best) < 0.15
    assert (palette.dtype, palette.shape, indices.dtype) == (np.float32, (1 << bits,), np.uint8)
    assert (np.diff(palette) >= 0).all() and (palette == palette.astype(np.float16)).all()


def test_every_value_has_its_nearest_index_and_every_palette_value_is_a_mean() -> None:
    weight = normal(64, 40)
    palette, indices = find_palette(weight, 4)
    np.testing.assert_array_equal(np.abs(weight[..., None] - palette).argmin(-1), indices)
    means = [weight[indices == index].mean() for index in range(16)]
    np.testing.assert_allclose(palette, means, rtol=2e-3, atol=2e-3)


def test_few_different_values_are_kept_exactly() -> None:
    weight = np.random.default_rng(1).choice(np.float32([-0.5, 0.25, 1.0, 2.0]), (32, 32))
    for bits in (2, 4, 6, 8):
        palette, indices = find_palette(weight, bits)
        np.testing.assert_array_equal(palette[indices], weight)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_weight(value: float) -> None:
    palette, indices = find_palette(np.full((8, 8), value, np.float32), 4)
    np.testing.assert_array_equal(palette[indices], value)


def test_sizes_that_core_ml_lacks() -> None:
    with pytest.raises(ExportError, match="palettes of 3 bits can't be made; Core ML has 1, 2, 4, 6, 8"):
        find_palette(normal(64), 3)


def test_the_graph_computes_with_the_palette() -> None:
    weight, x = normal(24, 32), normal(5, 24)
    model = one_matmul(weight)
    report = quantize(model, RECIPE)
    onnx.checker.check_model(model)
    palette, indices = find_palette(weight, 4)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ palette[indices], rtol=1e-4, atol=1e-5)
    assert report.bits == {"w": 4} and report.quantized == {"w": sqnr_db(weight, palette[indices])}


def test_a_weight_that_comes_back_too_badly_gets_more_bits() -> None:
    strict = Recipe("test", "palette4", 10, 10, min_elements=64, min_weight_sqnr_db=25, palette=4)
    report = quantize(one_matmul(normal(64, 64)), strict)
    assert report.bits == {"w": 6} and report.quantized["w"] > 25


def test_small_weights_and_embeddings_stay_float() -> None:
    assert quantize(one_matmul(normal(4, 8)), RECIPE).kept_float == {"w": "32 elements, fewer than 64"}
    model = one_matmul(normal(40, 16), "Gather")
    report = quantize(model, RECIPE)
    assert report.kept_float == {"w": "an embedding, stored as float16"} and not report.quantized
    assert [node.op_type for node in model.graph.node] == ["Cast", "Gather"]
    large = normal(16, 16)
    large[0, 0] = 1e6
    assert quantize(one_matmul(large), RECIPE).kept_float == {"w": "holds values beyond float16"}


@pytest.mark.parametrize("target", ["onnx", "openvino", "coreml,onnx"])
@pytest.mark.parametrize("recipe", ["palette4", "palette6", "palette-mixed"])
def test_other_targets_refuse_palettes(target: str, recipe: str) -> None:
    with pytest.raises(ExportError, match=f"recipe {recipe} is for the target coreml only; for .* choose int4 or int8"):
        make_plan("source", "bundle", target=target, recipe=recipe, size="64x64")


def test_the_recipes_are_what_the_cards_say() -> None:
    assert [(RECIPES[name].palette, RECIPES[name].weights) for name in ("palette4", "palette6")] == [
        (4, "palette4"),
        (6, "palette6"),
    ]


def one_matmul(weight: np.ndarray, op: str = "MatMul") -> onnx.ModelProto:
    inputs, kind = (["x", "w"], onnx.TensorProto.FLOAT) if op == "MatMul" else (["w", "x"], onnx.TensorProto.INT64)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, inputs, ["y"])],
        "test",
        [onnx.helper.make_tensor_value_info("x", kind, ["n", len(weight)] if op == "MatMul" else ["n"])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
