"""Enlarging and a 3x3 convolution as one 2x2 convolution: the same numbers, and only where it is exactly that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from pocketdiffusion_export.targets.onnx_upsample import fold_upsampling  # noqa: E402

CONV = {"dilations": [1, 1], "group": 1, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1]}
RESIZE = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
FREE = (1, 3, "height", "width")


def model(
    *,
    bias: bool = True,
    factor: float = 2.0,
    conv: dict[str, Any] | None = None,
    resize: dict[str, Any] | None = None,
    outputs: tuple[str, ...] = ("y",),
) -> Any:
    """Two enlargements, the second by a kernel without a bias if `bias` is False."""
    random = np.random.default_rng(1)
    arrays = {
        "scales": np.array([1, 1, factor, factor], np.float32),
        "first": random.standard_normal((5, 3, 3, 3)).astype(np.float32),
        "second": random.standard_normal((4, 5, 3, 3)).astype(np.float32),
        "bias": random.standard_normal(5).astype(np.float32),
    }
    attributes, way = CONV | (conv or {}), RESIZE | (resize or {})
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["large"], **way),
        helper.make_node("Conv", ["large", "first", *(["bias"] if bias else [])], ["middle"], **attributes),
        helper.make_node("Resize", ["middle", "", "scales"], ["larger"], **way),
        helper.make_node("Conv", ["larger", "second"], ["y"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, FREE)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", "c", "h", "w")) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(made: Any, height: int, width: int) -> Any:
    onnx.checker.check_model(made, full_check=True)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((1, 3, height, width)).astype(np.float32)
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (1, 2), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_numbers_to_the_edges(height: int, width: int, bias: bool) -> None:
    made = model(bias=bias)
    expected = run(made, height, width)
    assert fold_upsampling(made, 3) == 2
    assert [node.op_type for node in made.graph.node] == ["Conv", "DepthToSpace", "Slice"] * 2
    assert not {"first", "second", "scales"} & {tensor.name for tensor in made.graph.initializer}
    found = run(made, height, width)
    assert found.shape == expected.shape == (1, 4, 4 * height, 4 * width)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 3.0},
        {"conv": {"pads": [0, 0, 0, 0]}},
        {"conv": {"dilations": [2, 2], "pads": [2, 2, 2, 2]}},
        {"resize": {"nearest_mode": "ceil"}},
        {"resize": {"mode": "linear"}},
        {"outputs": ("y", "large", "larger")},
    ],
)
def test_all_else_stays(changes: dict[str, Any]) -> None:
    made = model(**changes)
    before = made.SerializeToString()
    assert fold_upsampling(made, 3) == 0
    assert made.SerializeToString() == before


def test_few_channels_are_not_worth_it() -> None:
    assert [fold_upsampling(model(), least) for least in (3, 4, 6)] == [2, 1, 0]
    assert fold_upsampling(model()) == 0


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("banded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exports_are_folded_unless_pieces_are_cut_at_a_resize(tmp_path: Path, preset: Path, banded: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    from pocketdiffusion_export.export import export
    from pocketdiffusion_export.plan import make_plan

    from . import family_sources as sources

    wide = sources.vae(block_out_channels=(16, 256))
    sources.sd(tmp_path / "source", diffusers.StableDiffusionPipeline, vae=wide)
    (made,) = export(
        make_plan(tmp_path / "source", tmp_path / "made", preset=preset, banded_vae=banded), lambda line: None
    ).bundles
    graph = onnx.load(tmp_path / "made" / "vae_decoder" / "model.onnx").graph
    kinds = {node.op_type for node in graph.node} & {"Resize", "DepthToSpace"}
    assert kinds == ({"Resize"} if banded else {"DepthToSpace"})
    assert min(item.sqnr_db for item in made.measured if item.component == "vae_decoder") >= 60
