"""Graph cleaning: fewer nodes, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from pocketdiffusion_export.targets.onnx_clean import clean  # noqa: E402

pytestmark = pytest.mark.torch


def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    made = onnx.helper.make_node(op, inputs, [output], name=f"/net/{op}_{output}", **attributes)
    made.doc_string = "File /somewhere/module.py, line 1"
    return made


def constant(value: object, output: str) -> onnx.NodeProto:
    return node("Constant", [], output, value=onnx.numpy_helper.from_array(np.asarray(value), ""))


def messy() -> onnx.ModelProto:
    """y = (x + 2) * (x + 2) + w + w2, with w equal to w2, by detours."""
    nodes = [
        constant(np.float32(1), "one"),
        constant(np.float32(1), "one_again"),
        node("Add", ["one", "one_again"], "two"),
        node("Identity", ["x"], "x1"),
        node("Add", ["x1", "two"], "a"),
        node("Add", ["x", "two"], "b"),
        node("Mul", ["a", "b"], "c"),
        node("Exp", ["c"], "dead"),
        node("Add", ["c", "w"], "d"),
        node("Add", ["d", "w2"], "y"),
    ]
    w = np.arange(4, dtype=np.float32)
    graph = onnx.helper.make_graph(
        nodes,
        "main_graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(w, "w2")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_the_same_numbers_from_fewer_nodes() -> None:
    before, after = messy(), clean(messy())
    onnx.checker.check_model(after, full_check=True)
    assert [item.op_type for item in after.graph.node] == ["Add", "Mul", "Add", "Add"]
    assert {item.name for item in after.graph.initializer} == {"w", "c0"}
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_array_equal(evaluate(before, x), evaluate(after, x))


def test_nothing_of_tracing_remains() -> None:
    content = clean(messy()).SerializeToString()
    assert b"/net/" not in content and b"somewhere" not in content


def test_scalars_stay_scalars() -> None:
    (two,) = [item for item in clean(messy()).graph.initializer if item.name == "c0"]
    assert tuple(two.dims) == ()


def evaluate(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
