"""ONNX operators as ML programs: read back from the package and computed in torch, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
pytest.importorskip("coremltools")

from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.targets.coreml import TARGET  # noqa: E402
from pocketdiffusion_export.targets.coreml_program import Program  # noqa: E402
from pocketdiffusion_export.targets.coreml_weights import pack, unpack  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

make, array = onnx.helper, onnx.numpy_helper.from_array
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


OPSETS = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
Nodes = list[tuple[str, list[str], str, dict[str, Any]]]
CASES: dict[str, tuple[tuple[int, ...], Nodes, dict[str, np.ndarray]]] = {
    "conv": (
        (2, 4, 9, 8),
        [("Conv", ["x", "w", "b"], "y", {"pads": [0, 1, 2, 3], "strides": [2, 1], "dilations": [1, 2], "group": 2})],
        {"w": normal(6, 2, 3, 3), "b": normal(6)},
    ),
    "linear with a bias behind": (
        (2, 5, 8),
        [("MatMul", ["x", "w"], "m", {}), ("Add", ["b", "m"], "y", {})],
        {"w": normal(8, 8), "b": normal(8)},
    ),
    "linear, its result read twice": (
        (2, 5, 8),
        [("MatMul", ["x", "w"], "m", {}), ("Add", ["b", "m"], "a", {}), ("Mul", ["a", "m"], "y", {})],
        {"w": normal(8, 6), "b": normal(6)},
    ),
    "matmul of four axes": ((2, 3, 5, 8), [("MatMul", ["x", "w"], "y", {})], {"w": normal(8, 6)}),
    "attention": (
        (2, 6, 8),
        [
            ("Reshape", ["x", "heads"], "h", {}),
            ("Transpose", ["h"], "q", {"perm": [0, 2, 1, 3]}),
            ("Transpose", ["h"], "k", {"perm": [0, 2, 3, 1]}),
            ("MatMul", ["q", "k"], "s", {}),
            ("Softmax", ["s"], "p", {"axis": -1}),
            ("MatMul", ["p", "q"], "o", {}),
            ("Transpose", ["o"], "t", {"perm": [0, 2, 1, 3]}),
            ("Reshape", ["t", "flat"], "y", {}),
        ],
        {"heads": ints(0, 0, 2, -1), "flat": ints(0, 0, -1)},
    ),
    "fused attention": (
        (2, 6, 8),
        [
            ("Mul", ["x", "two"], "k", {}),
            ("Slice", ["k", "zero", "three", "one"], "s", {}),
            ("MultiHeadAttention", ["x", "s", "s"], "y", {"num_heads": 2, "scale": 0.7, "domain": "com.microsoft"}),
        ],
        {"two": np.float32(2), "zero": ints(0), "three": ints(3), "one": ints(1)},
    ),
    "every second row of a map": (
        (2, 24, 8),
        [
            ("Shape", ["x"], "ends", {"start": 0, "end": -2}),
            ("Shape", ["x"], "width", {"start": 2}),
            ("Concat", ["ends", "sides", "width"], "s", {"axis": 0}),
            ("Reshape", ["x", "s"], "m", {}),
            ("Slice", ["m", "zeros", "far", "axes", "steps"], "k", {}),
            ("Reshape", ["k", "rows"], "y", {}),
        ],
        {
            "sides": ints(4, 6),
            "zeros": ints(0, 0),
            "far": ints(2**31 - 1, 2**31 - 1),
            "axes": ints(1, 2),
            "steps": ints(2, 2),
            "rows": ints(0, -1, 8),
        },
    ),
    "gemm": ((3, 8), [("Gemm", ["x", "w", "b"], "y", {"transB": 1})], {"w": normal(5, 8), "b": normal(5)}),
    "gemm, the other way": ((3, 8), [("Gemm", ["x", "w", "b"], "y", {})], {"w": normal(8, 5), "b": normal(5)}),
    "layer norm": (
        (2, 3, 8),
        [("LayerNormalization", ["x", "g", "b"], "y", {"axis": -1, "epsilon": 1e-3})],
        {"g": normal(8), "b": normal(8)},
    ),
    "group norm": (
        (2, 8, 4, 4),
        [
            ("Shape", ["x"], "s", {}),
            ("Reshape", ["x", "groups"], "g", {}),
            ("InstanceNormalization", ["g", "one", "zero"], "n", {"epsilon": 1e-3}),
            ("Reshape", ["n", "s"], "r", {}),
            ("Mul", ["r", "w"], "y", {}),
        ],
        {"groups": ints(0, 4, -1), "one": np.ones(4, np.float32), "zero": normal(4), "w": normal(8, 1, 1)},
    ),
    "gelu": (
        (2, 8),
        [
            ("Div", ["x", "root"], "d", {}),
            ("Erf", ["d"], "e", {}),
            ("Add", ["e", "one"], "a", {}),
            ("Mul", ["x", "a"], "m", {}),
            ("Mul", ["m", "half"], "y", {}),
        ],
        {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)},
    ),
    "unary": (
        (2, 8),
        [
            ("Sigmoid", ["x"], "a", {}),
            ("Sin", ["a"], "b", {}),
            ("Cos", ["b"], "c", {}),
            ("Exp", ["c"], "d", {}),
            ("Sqrt", ["d"], "e", {}),
            ("Tanh", ["e"], "f", {}),
            ("Sub", ["f", "h"], "g", {}),
            ("Relu", ["g"], "r", {}),
            ("Pow", ["r", "two"], "y", {}),
        ],
        {"h": np.float32(0.9), "two": np.float32(2)},
    ),
    "slices, a concat and a gather": (
        (4, 6, 3),
        [
            ("Slice", ["x", "s1", "e1", "a1", "k1"], "a", {}),
            ("Slice", ["x", "s2", "e2", "a2"], "b", {}),
            ("Concat", ["a", "b"], "c", {"axis": 1}),
            ("Gather", ["c", "two"], "y", {"axis": 1}),
        ],
        {
            "s1": ints(-5, 1),
            "e1": ints(2**62, -1),
            "a1": ints(1, 0),
            "k1": ints(2, 1),
            "s2": ints(1),
            "e2": ints(3),
            "a2": ints(0),
            "two": np.int64(2),
        },
    ),
    "the first of something": (
        (2, 5, 3),
        [
            ("ReduceL2", ["x"], "n", {"axes": [2], "keepdims": 0}),
            ("ArgMax", ["n"], "i", {"axis": -1, "keepdims": 1}),
            ("Unsqueeze", ["i", "last"], "u", {}),
            ("Expand", ["u", "shape"], "w", {}),
            ("GatherElements", ["x", "w"], "g", {"axis": 1}),
            ("Squeeze", ["g", "one"], "y", {}),
        ],
        {"last": ints(2), "shape": ints(-1, 1, 3) * 0 + ints(2, 1, 3), "one": ints(1)},
    ),
    "doubling": (
        (2, 3, 4, 5),
        [("Resize", ["x", "", "scales"], "y", NEAREST)],
        {"scales": np.float32([1, 1, 2, 3])},
    ),
    "padding": ((1, 3, 4, 5), [("Pad", ["x", "pads"], "y", {})], {"pads": ints(0, 0, 0, 1, 0, 0, 2, 3)}),
    "pools": (
        (2, 3, 9, 8),
        [
            ("MaxPool", ["x"], "m", {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
            ("BatchNormalization", ["m", "g", "b", "u", "v"], "n", {"epsilon": 1e-3}),
            ("GlobalAveragePool", ["n"], "a", {}),
            ("Flatten", ["a"], "y", {}),
        ],
        {"g": normal(3), "b": normal(3), "u": normal(3), "v": np.float32([0.5, 1, 2])},
    ),
    "clip": ((3, 8), [("Clip", ["x", "low"], "y", {})], {"low": np.float32(0.25)}),
}


def model_of(shape: tuple[int, ...], nodes: Nodes, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph = make.make_graph(
        [make.make_node(kind, inputs, [output], **facts) for kind, inputs, output, facts in nodes],
        "graph",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return make.make_model(graph, opset_imports=OPSETS, ir_version=8)


def both(model: onnx.ModelProto, shape: tuple[int, ...], folder: Path) -> tuple[np.ndarray, np.ndarray, Program]:
    x = normal(*shape)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # float arithmetic after dequantization
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    TARGET.save(model, folder / "Model.mlpackage", {"x": shape, "y": expected.shape})
    program = Program(folder / "Model.mlpackage")
    return expected, program.run({"x": x})["y"], program


@pytest.mark.parametrize("case", CASES)
def test_each_operator_computes_what_onnxruntime_does(case: str, tmp_path: Path) -> None:
    shape, nodes, tensors = CASES[case]
    expected, found, _ = both(model_of(shape, nodes, tensors), shape, tmp_path)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "tensors", "words"),
    [
        ([("Hardmax", ["x"], "y", {})], {}, "the operator Hardmax can't be written for Core ML; known: Add, ArgMax"),
        ([("Pad", ["x", "p"], "y", {"mode": "reflect"})], {"p": ints(0, 1, 0, 1)}, "padding with anything but zeros"),
        ([("Gemm", ["x", "w"], "y", {"alpha": 0.5})], {"w": normal(4, 4)}, "a Gemm with factors"),
        ([("MaxPool", ["x"], "y", {"kernel_shape": [2], "ceil_mode": 1})], {}, "cut windows"),
        (
            [("Slice", ["x", "s", "e", "a", "k"], "y", {})],
            {"s": ints(3), "e": ints(0), "a": ints(1), "k": ints(-1)},
            "runs backwards",
        ),
    ],
)
def test_what_can_not_be_written_is_one_line(nodes, tensors, words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        TARGET.save(model_of((3, 4), nodes, tensors), tmp_path / "Model.mlpackage", {"x": (3, 4), "y": (3, 4)})
    assert "\n" not in str(caught.value)


def stored(kind: str, weight: np.ndarray, op: str) -> tuple[Nodes, dict[str, np.ndarray], np.ndarray]:
    """Nodes and tensors that make `w`, and its value."""
    axis = 0 if op == "Conv" else 1
    if kind == "half":
        half = weight.astype(np.float16)
        return [("Cast", ["w16"], "w", {"to": 1})], {"w16": half}, half.astype(np.float32)
    if kind == "int8":
        scale = RNG.uniform(0.01, 0.02, weight.shape[axis]).astype(np.float32)
        codes = RNG.integers(-127, 128, weight.shape, np.int8)
        along = [-1 if index == axis else 1 for index in range(weight.ndim)]
        nodes: Nodes = [("DequantizeLinear", ["q", "s"], "w", {"axis": axis})]
        return nodes, {"q": codes, "s": scale}, codes * scale.reshape(along)
    palette = np.sort(normal(1 << int(kind))).astype(np.float16).astype(np.float32)
    indices = RNG.integers(0, len(palette), weight.shape, np.uint8)
    nodes = [("Cast", ["i"], "wide", {"to": 6}), ("Gather", ["p", "wide"], "w", {})]
    return nodes, {"i": indices, "p": palette}, palette[indices]


@pytest.mark.parametrize("op", ["Conv", "MatMul", "Gemm"])
@pytest.mark.parametrize("kind", ["half", "int8", "4", "6", "8"])
def test_stored_weights_stay_what_they_are(kind: str, op: str, tmp_path: Path) -> None:
    shape, size = ((1, 8, 6, 6), (12, 8, 3, 3)) if op == "Conv" else ((5, 16), (16, 12))
    making, tensors, value = stored(kind, normal(*size), op)
    model = model_of(shape, [*making, (op, ["x", "w"], "y", {})], tensors)
    expected, found, program = both(model, shape, tmp_path)
    # x and y are float16 inside, which is 11 bits
    assert np.abs(found - expected).max() < 4e-3 * np.abs(expected).max()
    ((name, weight),) = program.weights()
    turned = weight if op != "MatMul" else weight.T
    assert (name, weight.dtype) == ("w_linear" if op == "MatMul" else "w", np.float16)
    np.testing.assert_allclose(turned, value, rtol=2e-3, atol=1e-4)
    bits = {"half": 16, "int8": 8}.get(kind) or int(kind)
    file = tmp_path / "Model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert value.size * bits / 8 <= file.stat().st_size < value.size * bits / 8 + 1000


def test_int4_in_groups_is_refused(tmp_path: Path) -> None:
    nodes: Nodes = [
        ("DequantizeLinear", ["q", "s"], "w", {"axis": 0, "block_size": 4}),
        ("MatMul", ["x", "w"], "y", {}),
    ]
    model = model_of((5, 8), nodes, {"q": np.ones((8, 4), np.int8), "s": np.ones((2, 4), np.float32)})
    with pytest.raises(ExportError, match="int4 weights in groups can't be written for Core ML; choose --recipe"):
        TARGET.save(model, tmp_path / "Model.mlpackage", {"x": (5, 8), "y": (5, 4)})


def test_a_mask_fits_float16_and_other_large_numbers_are_refused(tmp_path: Path) -> None:
    making, tensors, _ = stored("half", normal(8, 8), "MatMul")
    nodes: Nodes = [
        *making,
        ("MatMul", ["x", "w"], "m", {}),
        ("Add", ["m", "mask"], "s", {}),
        ("Softmax", ["s"], "y", {}),
    ]
    mask = np.triu(np.full((8, 8), np.finfo(np.float32).min, np.float32), 1)
    expected, found, _ = both(model_of((8, 8), nodes, {**tensors, "mask": mask}), (8, 8), tmp_path)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    model = model_of((8, 8), nodes, {**tensors, "mask": np.full((8, 8), 1e5, np.float32)})
    with pytest.raises(ExportError, match="too large for float16; export with --recipe fp32"):
        TARGET.save(model, tmp_path / "Other.mlpackage", {"x": (8, 8), "y": (8, 8)})


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_packing_is_coremltools_own(bits: int) -> None:
    from coremltools.optimize import _utils

    codes = RNG.integers(0, 1 << bits, 1001, np.uint8)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(packed, _utils.pack_elements_into_bits(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits, codes.size), codes)


def test_free_axes_are_refused(tmp_path: Path) -> None:
    model = model_of(("batch", 4), [("Relu", ["x"], "y", {})], {})
    with pytest.raises(ExportError, match="fixed sizes, 'x' has free batch; give --size WIDTHxHEIGHT"):
        TARGET.save(model, tmp_path / "Model.mlpackage", {"y": (1, 4)})


def test_a_stored_constant_can_be_added(tmp_path: Path) -> None:
    making, tensors, value = stored("half", normal(4, 8), "MatMul")
    model = model_of((4, 8), [*making, ("Add", ["x", "w"], "a", {}), ("Mul", ["a", "w"], "y", {})], tensors)
    expected, found, _ = both(model, (4, 8), tmp_path)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)
    assert value.shape == found.shape


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    shape, nodes, tensors = CASES["attention"]
    model = model_of(shape, nodes, tensors)
    for name in ("one", "two"):
        TARGET.save(model, tmp_path / f"{name}.mlpackage", {"x": shape, "y": shape})
    one, two = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "one.mlpackage", tmp_path / "two.mlpackage")
    )
    assert one == two and len(one) >= 2
